"""Entry point of the command line: parses arguments, runs the command, prints errors in two lines.

Commands import heavy modules inside their functions, so that `--help` is fast. Results go to
stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from mlxgpt.backend import device_errors, macos, memory_limits, supervisor
from mlxgpt.cli import streams
from mlxgpt.cli.console import logging_to_console
from mlxgpt.cli.interrupts import redeliver_interrupt
from mlxgpt.cli.output import EXIT_INTERRUPTED, print_stderr
from mlxgpt.cli.parser import COMMANDS, make_parser
from mlxgpt.distributed.launcher import get_rank
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

METRICS_THREAD = "metrics-logger"  # name of the thread in training/loggers.py


def run_and_exit() -> NoReturn:
    """Entry point of the program `mlxgpt`: run `main`, and exit the process."""
    code: Any
    if "_ARGCOMPLETE" in os.environ:  # set by the shell when it requests completions
        import argcomplete

        argcomplete.autocomplete(make_parser())
    streams.install_streams()
    sys.unraisablehook = redeliver_interrupt
    is_child = supervisor.enter_supervised_child()
    try:
        supervise = memory_limits.memory_limits() and not is_child
        code = supervisor.run_supervised() if supervise else main()
    except UserError as error:  # from the supervisor
        code = _report_error(error)
    except SystemExit as system_exit:  # from --help and --version
        code = system_exit.code
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was being handled
        code = EXIT_INTERRUPTED
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        print_stderr(_describe_bug(error))
        code = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            code = code or _report_error(_to_user_error(error))
        streams.redirect_to_devnull(sys.stdout)  # else Python prints an error at exit
    exit_code = (code or 0) + supervisor.CLEAN_EXIT_OFFSET if is_child else code
    logger_hangs = any(thread.name == METRICS_THREAD for thread in threading.enumerate())
    if code or logger_hangs:
        # Exit without waiting for threads: busy threads of libraries have been seen to abort a
        # process that exits normally after an error.
        os._exit(exit_code)
    sys.exit(exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 for a user error, 130 when interrupted."""
    command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        macos.check_apple_silicon()
        parser = make_parser()
        if not command_line:
            parser.print_help()
            return 0
        args = vars(parser.parse_args(command_line))
        memory_limits.check_memory_limits()
        command = COMMANDS[args.pop("command")]
        with logging_to_console():
            return command.run(args, command_line)
    except UserError as error:
        return _report_error(error)
    except KeyboardInterrupt:
        print_stderr("mlxgpt: stopped")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout closed it (`| head -1`)
        return 0
    except OSError as error:  # a file error that no caller has explained
        return _report_error(_to_user_error(error))
    except (MemoryError, RuntimeError, ImportError) as error:
        notice = _disable_compilation(error)
        failure = device_errors.classify_device_error(error)
        problem = failure.to_user_error() if failure else memory_limits.explain_out_of_memory(error)
        if not (notice or problem):
            raise
    if not notice:
        assert problem
        return _report_error(problem)
    print_stderr(f"{notice}; starting over")
    return main(command_line)


def _disable_compilation(error: BaseException) -> str | None:
    """Disable compiled kernels from now on if one failed to compile. Returns the log line."""
    if not isinstance(error, RuntimeError) or not device_errors.is_compile_failure(error):
        return None
    from mlxgpt.backend import execution

    return execution.disable_compilation_on_error(error)


def _to_user_error(error: OSError) -> UserError:
    if error.filename == streams.STDOUT_NAME:  # not "run it again": its files are complete
        return UserError(
            f"{streams.STDOUT_NAME}: {error.strerror}",
            "redirect it elsewhere; the files that the command wrote are complete.",
        )
    prefix = f"{error.filename}: " if error.filename else ""
    return UserError(f"{prefix}{error.strerror or error}", files.find_remedy(error))


def _describe_bug(error: Exception) -> str:
    """The line below a traceback."""
    message = " ".join(str(error).split())
    problem = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return (
        f"mlxgpt: unexpected error, {problem}; please report it with the output of `mlxgpt doctor`"
    )


def _report_error(error: UserError) -> int:
    if get_rank() == 0:  # the main rank prints the error of all ranks
        print_stderr(f"mlxgpt: {error.problem}\n  → {error.remedy}")
    else:
        time.sleep(1)  # a launcher kills the main rank as soon as another one exits
    return 2
