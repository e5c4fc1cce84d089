"""The command line: each command parses its arguments, calls one API function, prints the result.

Heavy imports are inside the commands, so that `--help` is quick. Results go to stdout, everything
else to stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any, NoReturn

from mlxgpt.backend import device_errors, macos, memory_limits, supervisor
from mlxgpt.cli import streams
from mlxgpt.cli.arguments import make_parser
from mlxgpt.cli.console import logging_to_console
from mlxgpt.distributed.launcher import get_rank, prepend_launcher
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

EXIT_INTERRUPTED = 130
METRICS_THREAD = "metrics-logger"  # name of the thread in training/loggers.py


def run() -> NoReturn:
    """Entry point of the program `mlxgpt`: runs `main` and ends the process."""
    code: Any
    streams.install_streams()
    is_child = supervisor.enter_supervised_child()
    try:
        code = (
            supervisor.run_supervised()
            if memory_limits.memory_limits() and not is_child
            else main()
        )
    except UserError as error:  # from the supervisor
        code = _report_error(error)
    except SystemExit as system_exit:  # from --help and --version
        code = system_exit.code
    except KeyboardInterrupt:  # a second one, while the first was handled
        code = EXIT_INTERRUPTED
    except Exception:
        if not is_child:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            code = code or _report_error(_to_user_error(error))
        streams.redirect_to_devnull(sys.stdout)  # else Python complains when it exits
    exit_code = (code or 0) + supervisor.CLEAN_EXIT_OFFSET if is_child else code
    logger_hangs = any(thread.name == METRICS_THREAD for thread in threading.enumerate())
    if code or logger_hangs:
        # At once, without waiting for threads that still compute; threads of libraries that were
        # at work when a text was refused have been seen to abort a process that exits normally.
        os._exit(exit_code)
    sys.exit(exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
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
            return command(args, command_line)
    except UserError as error:
        return _report_error(error)
    except KeyboardInterrupt:
        _print_stderr("mlxgpt: stopped")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has closed it (`| head -1`)
        return 0
    except OSError as error:  # of a file, where no caller could say more
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
    _print_stderr(f"{notice}; starting over")
    return main(command_line)


def _disable_compilation(error: BaseException) -> str | None:
    """Where a kernel could not be compiled: fuse none from now on, and one line on that."""
    if not isinstance(error, RuntimeError) or not device_errors.is_compile_failure(error):
        return None
    from mlxgpt.backend import execution

    return execution.disable_compilation_on_error(error)


def _to_user_error(error: OSError) -> UserError:
    if (
        error.filename == streams.STDOUT_NAME
    ):  # given again, an import would say that its run exists
        return UserError(
            f"{streams.STDOUT_NAME}: {error.strerror}",
            "let it write elsewhere; the files that the command made are there.",
        )
    prefix = f"{error.filename}: " if error.filename else ""
    return UserError(f"{prefix}{error.strerror or error}", files.find_remedy(error))


def _report_error(error: UserError) -> int:
    if get_rank() == 0:  # which says what the others refuse, too
        _print_stderr(f"mlxgpt: {error.problem}\n  → {error.remedy}")
    else:
        time.sleep(1)  # a launcher ends the first one as soon as another has ended
    return 2


def _prepare(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.progress import PreparationDisplay

    as_json, source = args.pop("json"), args.pop("source")
    with closing(PreparationDisplay()) as display:
        dataset = api.prepare(*source, progress=display.show_progress, **_drop_none(args))
    meta = dataset.meta
    if as_json:
        return _print_json({"folder": str(dataset.folder), **asdict(meta)})
    print(
        f"{dataset.folder}: {meta.train.tokens:,} training tokens, {meta.val.tokens:,} validation "
        f"tokens, vocabulary {meta.vocab_size:,}"
    )
    tier = 1 if "tokenizer" not in meta.origin else 2  # characters are not named
    train_command = shlex.join(
        ["mlxgpt", "train", "--tier", str(tier), "--source", str(dataset.folder)]
    )
    _print_stderr(f"train on it: {train_command}")
    return 0


def _train(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.progress import TrainingDisplay

    as_json = args.pop("json")
    with closing(TrainingDisplay()) as display:
        summary = api.train(callbacks=[display], **_drop_none(args))
    if as_json and get_rank() == 0:
        _print_json(asdict(summary))
    if summary.interrupted and get_rank() == 0:
        resume_command = shlex.join(["mlxgpt", *command_line])
        _print_stderr(f"resume with: {prepend_launcher(resume_command)}")
        return EXIT_INTERRUPTED
    return 0  # of another rank too: a launcher would end the first one in the middle of a word


def _compare(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.compare_view import ComparisonDisplay, show_comparison

    as_json, variants = args.pop("json"), args.pop("variants")
    with ComparisonDisplay() as display:
        record = api.compare(*variants, callbacks=[display], **_drop_none(args))
    if as_json:
        _print_json(asdict(record))
    else:
        show_comparison(record)
    if record.interrupted:
        _print_stderr(f"resume with: {shlex.join(['mlxgpt', *command_line])}")
        return EXIT_INTERRUPTED
    return 0


def _import(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.model.stats import count_parameters

    as_json = args.pop("json")
    run = api.import_model(args.pop("source"), **_drop_none(args))
    count = count_parameters(run.config.model)
    if as_json:
        return _print_json({"run": run.folder, "parameters": count, "origin": run.origin})
    print(f"{run.folder}: {count:,} parameters, vocabulary {run.tokenizer.vocab_size:,}")
    example = "Alan Turing theorized that computers would one day become"
    prompt_args = [example] if run.config.data.tokenizer == "gpt2" else []
    _print_stderr(
        "try it: " + shlex.join(["mlxgpt", "generate", "--run", str(run.folder), *prompt_args])
    )
    return 0


def _export(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json")
    result = api.export(**_drop_none(args))
    if as_json:
        return _print_json(asdict(result))
    print(f"{result.folder}: the model after {result.step:,} steps")
    if result.perplexity and result.quantized_perplexity:
        print(f"perplexity     {result.perplexity:.4f}")
        print(f"quantized      {result.quantized_perplexity:.4f}")
    _print_stderr(f"how to run it: {result.folder}/README.md")
    return 0


def _generate(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.prompts import read_prompts

    as_json, prompts_file = args.pop("json"), args.pop("prompts")
    if args.pop("interactive"):
        if as_json or prompts_file or args.pop("prompt") is not None or "samples" in args:
            raise UserError(
                "--interactive asks for one prompt after the other",
                "leave out the prompt, --prompts, --samples and --json.",
            )
        from mlxgpt.cli.repl import run_repl

        run_repl(_drop_none(args), _write_stdout, _print_stderr)
        return 0
    if prompts_file is not None:
        if args["prompt"] is not None:
            raise UserError("a prompt and --prompts are given", "give one of them.")
        args["prompt"] = read_prompts(prompts_file)
    is_single = args.get("samples", 1) == 1 and prompts_file is None
    if is_single and not as_json:
        stream = api.stream(**_drop_none(args))
        _write_stdout(stream.prompt)
        for piece in stream:
            _write_stdout(piece)
        print(flush=True)
        stream.log_long_texts()
        result = stream.result
    else:
        result = api.generate(**_drop_none(args))
    if as_json:
        return _print_json(asdict(result))
    if not is_single:
        from mlxgpt.cli.tables import show_texts

        show_texts(result.texts)
    _print_stderr(
        f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} a second, seed {result.seed}"
    )
    return 0


def _eval(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli import tables

    as_json, quality = args.pop("json"), args.pop("quality")
    hellaswag_file, limit = args.pop("hellaswag"), args.pop("limit")
    _check_eval_flags(quality, hellaswag_file, limit, args["source"])
    result: Any
    if quality:
        del args["source"]
        result = api.appraise(**_drop_none(args))
        show: Callable[[Any], None] = tables.show_appraisal
    elif hellaswag_file is not None:
        del args["source"], args["data_dir"]
        from mlxgpt.cli.progress import CountingDisplay

        with CountingDisplay("examples") as display:
            result = api.hellaswag(
                file=hellaswag_file or None,
                limit=limit,
                progress=display.show_progress,
                **_drop_none(args),
            )
        show = tables.show_hellaswag
    else:
        result = api.evaluate(**_drop_none(args))
        show = tables.show_evaluation
    if as_json:
        return _print_json(asdict(result))
    show(result)
    if hellaswag_file is not None:
        _print_stderr(
            "a guess: 0.25; GPT-2 124M by the same rule, in build-nanogpt: 0.2859, norm 0.2955"
        )
    return 0


def _check_eval_flags(quality: bool, hellaswag: str | None, limit: int | None, source: Any) -> None:
    if quality and (hellaswag is not None or limit is not None):
        raise UserError("--quality and --hellaswag are given", "give one of them.")
    if quality and source:
        raise UserError(
            "--quality compares with the run's own text", "leave out --source, or --quality."
        )
    if hellaswag is not None and source:
        raise UserError("--hellaswag has its own text", "leave out --source, or --hellaswag.")
    if limit is not None and hellaswag is None:
        raise UserError("--limit belongs to --hellaswag", "leave it out, or add --hellaswag.")


def _bench(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.bench import distributed, report

    as_json, report_args = args.pop("json"), args.pop("report")
    if args.pop("distributed"):
        result = api.benchmark_distributed()
        if result:
            if as_json:
                return _print_json(asdict(result))
            print("\n".join(distributed.format_distributed_timing(result)))
        return 0
    if report_args:
        return _bench_report(report_args, as_json)
    measurement, paths = api.benchmark(**_drop_none(args))
    if as_json:
        return _print_json({"reports": [str(path) for path in paths], **asdict(measurement)})
    print(report.render_benchmark_report(measurement))
    _print_stderr(f"written to {paths[0]} and {paths[1].name}")
    return 0


def _bench_report(report_args: list[str], as_json: bool) -> int:
    """`mlxgpt bench report FILE…`: measurements side by side."""
    from mlxgpt.bench import side_by_side

    subcommand, *paths = report_args
    if subcommand != "report" or not paths:
        raise UserError(
            f"bench {' '.join(report_args)}: what to do is not clear",
            "say: mlxgpt bench, or mlxgpt bench report A.json B.json",
        )
    measurements = side_by_side.read_measurements(paths)
    if as_json:
        return _print_json([asdict(measurement) for measurement in measurements])
    print(side_by_side.render_machine_comparison(measurements), end="")
    return 0


def _check(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json")
    checks = api.check(**_default_to_tier_1(args))
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        from mlxgpt.cli.tables import show_checks

        show_checks(checks)
    return 1 if any(check.ok is False for check in checks) else 0


def _info(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json")
    result = api.info(**_drop_none(args))
    if as_json:
        return _print_json(asdict(result))
    from mlxgpt.cli.tables import show_info

    show_info(result)
    return 0


def _report(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json, targets = args.pop("json"), args.pop("what")
    path = api.report(*targets, **_drop_none(args))
    if as_json:
        return _print_json({"page": path})
    print(path)
    return 0


def _play(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json")

    def print_address(address: str, key: str) -> None:
        if as_json:
            _print_json({"page": f"{address}/#{key}", "api": f"{address}/v1", "key": key})
            sys.stdout.flush()
        else:
            _print_stderr(f"the page, until Ctrl-C: {address}/#{key}")
            _print_stderr(f"for other programs: {address}/v1, as OpenAI's API, with the key {key}")

    api.play(ready=print_address, browser=not args.pop("no_browser"), **_drop_none(args))
    return 0


def _runs(args: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.config.resolve import resolve_folder

    as_json, run_name = args.pop("json"), args.pop("plot")
    if run_name is not None:
        from mlxgpt.cli.tables import show_curve
        from mlxgpt.storage.run import find_run

        run = find_run(run_name, resolve_folder("runs", args["runs_dir"]))
        if as_json:
            return _print_json(list(run.metrics()))
        show_curve(run)
        return 0
    summaries = api.runs(**_drop_none(args))
    if as_json:
        return _print_json([asdict(summary) for summary in summaries])
    if not summaries:
        folder = resolve_folder("runs", args["runs_dir"]).absolute()
        print(f"no runs in {folder}; mlxgpt train --tier 1 makes one")
        return 0
    from mlxgpt.cli.tables import show_runs

    show_runs(summaries)
    return 0


def _drop_none(args: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line; the functions have the defaults."""
    return {name: value for name, value in args.items() if value is not None}


def _default_to_tier_1(args: dict[str, Any]) -> dict[str, Any]:
    """As `_present`; without a tier or a config, Tier 1."""
    present_args = _drop_none(args)
    return (
        present_args
        if "tier" in present_args or "config" in present_args
        else {"tier": 1, **present_args}
    )


def _print_json(value: Any) -> int:
    ascii_only = (
        "utf" not in (sys.stdout.encoding or "").lower()
    )  # JSON has a way to write the rest
    text = json.dumps(
        files.replace_nonfinite(value), default=str, ensure_ascii=ascii_only
    )  # str: paths
    # Bytes of a name that are not UTF-8 are escaped, as JSON can.
    print(text.encode("utf-8", "backslashreplace").decode())
    return 0


def _write_stdout(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _print_stderr(line: str) -> None:
    print(line, file=sys.stderr)


COMMANDS: dict[str, Callable[[dict[str, Any], list[str]], int]] = {
    "prepare": _prepare,
    "train": _train,
    "compare": _compare,
    "import": _import,
    "export": _export,
    "generate": _generate,
    "eval": _eval,
    "check": _check,
    "info": _info,
    "runs": _runs,
    "report": _report,
    "play": _play,
    "bench": _bench,
}
