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
from mlxgpt.distributed.launcher import again_by_launcher, rank_here
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

INTERRUPTED = 130
METRICS_THREAD = "metrics-logger"  # name of the thread in training/loggers.py


def run() -> NoReturn:
    """Entry point of the program `mlxgpt`: runs `main` and ends the process."""
    code: Any
    streams.install()
    is_child = supervisor.begin_as_child()
    try:
        code = supervisor.run_again() if memory_limits.limits() and not is_child else main()
    except UserError as error:  # from the supervisor
        code = _refuse(error)
    except SystemExit as end:  # from --help and --version
        code = end.code
    except KeyboardInterrupt:  # a second one, while the first was handled
        code = INTERRUPTED
    except Exception:
        if not is_child:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            code = code or _refuse(_of_file(error))
        streams.discard(sys.stdout)  # else Python complains when it exits
    exit_code = (code or 0) + supervisor.REGULAR if is_child else code
    logger_hangs = any(thread.name == METRICS_THREAD for thread in threading.enumerate())
    if code or logger_hangs:
        # At once, without waiting for threads that still compute; threads of libraries that were
        # at work when a text was refused have been seen to abort a process that exits normally.
        os._exit(exit_code)
    sys.exit(exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        macos.refuse_others()
        parser = make_parser()
        if not arguments:
            parser.print_help()
            return 0
        given = vars(parser.parse_args(arguments))
        memory_limits.refuse_too_little()
        command = COMMANDS[given.pop("command")]
        with logging_to_console():
            return command(given, arguments)
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        _say("mlxgpt: stopped")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has closed it (`| head -1`)
        return 0
    except OSError as error:  # of a file, where no caller could say more
        return _refuse(_of_file(error))
    except (MemoryError, RuntimeError, ImportError) as error:
        line = _disable_compilation(error)
        failure = device_errors.classify(error)
        problem = failure.to_user_error() if failure else memory_limits.exhausted(error)
        if not (line or problem):
            raise
    if not line:
        assert problem
        return _refuse(problem)
    _say(f"{line}; starting over")
    return main(arguments)


def _disable_compilation(error: BaseException) -> str | None:
    """Where a kernel could not be compiled: fuse none from now on, and one line on that."""
    if not isinstance(error, RuntimeError) or not device_errors.is_compile_failure(error):
        return None
    from mlxgpt.backend import execution

    return execution.disable_compilation_after(error)


def _of_file(error: OSError) -> UserError:
    if error.filename == streams.RESULT:  # given again, an import would say that its run exists
        return UserError(
            f"{streams.RESULT}: {error.strerror}",
            "let it write elsewhere; the files that the command made are there.",
        )
    where = f"{error.filename}: " if error.filename else ""
    return UserError(f"{where}{error.strerror or error}", files.remedy_of(error))


def _refuse(error: UserError) -> int:
    if rank_here() == 0:  # which says what the others refuse, too
        _say(f"mlxgpt: {error.problem}\n  → {error.remedy}")
    else:
        time.sleep(1)  # a launcher ends the first one as soon as another has ended
    return 2


def _prepare(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.progress import PreparationDisplay

    as_json, source = given.pop("json"), given.pop("source")
    with closing(PreparationDisplay()) as display:
        dataset = api.prepare(*source, progress=display.progress, **_present(given))
    meta = dataset.meta
    if as_json:
        return _print_json({"folder": str(dataset.folder), **asdict(meta)})
    print(
        f"{dataset.folder}: {meta.train.tokens:,} training tokens, {meta.val.tokens:,} validation "
        f"tokens, vocabulary {meta.vocab_size:,}"
    )
    tier = 1 if "tokenizer" not in meta.origin else 2  # characters are not named
    train = shlex.join(["mlxgpt", "train", "--tier", str(tier), "--source", str(dataset.folder)])
    _say(f"train on it: {train}")
    return 0


def _train(given: dict[str, Any], arguments: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.progress import TrainingDisplay

    as_json = given.pop("json")
    with closing(TrainingDisplay()) as display:
        summary = api.train(callbacks=[display], **_present(given))
    if as_json and rank_here() == 0:
        _print_json(asdict(summary))
    if summary.interrupted and rank_here() == 0:
        command = shlex.join(["mlxgpt", *arguments])
        _say(f"resume with: {again_by_launcher(command)}")
        return INTERRUPTED
    return 0  # of another rank too: a launcher would end the first one in the middle of a word


def _compare(given: dict[str, Any], arguments: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.compare_view import ComparisonDisplay, show_comparison

    as_json, variants = given.pop("json"), given.pop("variants")
    with ComparisonDisplay() as display:
        record = api.compare(*variants, callbacks=[display], **_present(given))
    if as_json:
        _print_json(asdict(record))
    else:
        show_comparison(record)
    if record.interrupted:
        _say(f"resume with: {shlex.join(['mlxgpt', *arguments])}")
        return INTERRUPTED
    return 0


def _import(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.model.stats import count_parameters

    as_json = given.pop("json")
    run = api.import_model(given.pop("source"), **_present(given))
    count = count_parameters(run.config.model)
    if as_json:
        return _print_json({"run": run.folder, "parameters": count, "origin": run.origin})
    print(f"{run.folder}: {count:,} parameters, vocabulary {run.tokenizer.vocab_size:,}")
    example = "Alan Turing theorized that computers would one day become"
    prompt = [example] if run.config.data.tokenizer == "gpt2" else []
    _say("try it: " + shlex.join(["mlxgpt", "generate", "--run", str(run.folder), *prompt]))
    return 0


def _export(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    result = api.export(**_present(given))
    if as_json:
        return _print_json(asdict(result))
    print(f"{result.folder}: the model after {result.step:,} steps")
    if result.perplexity and result.quantized_perplexity:
        print(f"perplexity     {result.perplexity:.4f}")
        print(f"quantized      {result.quantized_perplexity:.4f}")
    _say(f"how to run it: {result.folder}/README.md")
    return 0


def _generate(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.prompts import prompts_in

    as_json, file = given.pop("json"), given.pop("prompts")
    if given.pop("interactive"):
        if as_json or file or given.pop("prompt") is not None or "samples" in given:
            raise UserError(
                "--interactive asks for one prompt after the other",
                "leave out the prompt, --prompts, --samples and --json.",
            )
        from mlxgpt.cli.repl import converse

        converse(_present(given), _write, _say)
        return 0
    if file is not None:
        if given["prompt"] is not None:
            raise UserError("a prompt and --prompts are given", "give one of them.")
        given["prompt"] = prompts_in(file)
    alone = given.get("samples", 1) == 1 and file is None
    if alone and not as_json:
        stream = api.stream(**_present(given))
        _write(stream.prompt)
        for piece in stream:
            _write(piece)
        print(flush=True)
        stream.log_long_texts()
        result = stream.result
    else:
        result = api.generate(**_present(given))
    if as_json:
        return _print_json(asdict(result))
    if not alone:
        from mlxgpt.cli.tables import show_texts

        show_texts(result.texts)
    _say(f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} a second, seed {result.seed}")
    return 0


def _eval(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli import tables

    as_json, quality = given.pop("json"), given.pop("quality")
    file, limit = given.pop("hellaswag"), given.pop("limit")
    _refuse_mixed_evaluations(quality, file, limit, given["source"])
    result: Any
    if quality:
        del given["source"]
        result = api.appraise(**_present(given))
        show: Callable[[Any], None] = tables.show_appraisal
    elif file is not None:
        del given["source"], given["data_dir"]
        from mlxgpt.cli.progress import CountingDisplay

        with CountingDisplay("examples") as display:
            result = api.hellaswag(
                file=file or None, limit=limit, progress=display.progress, **_present(given)
            )
        show = tables.show_hellaswag
    else:
        result = api.evaluate(**_present(given))
        show = tables.show_evaluation
    if as_json:
        return _print_json(asdict(result))
    show(result)
    if file is not None:
        _say("a guess: 0.25; GPT-2 124M by the same rule, in build-nanogpt: 0.2859, norm 0.2955")
    return 0


def _refuse_mixed_evaluations(
    quality: bool, hellaswag: str | None, limit: int | None, source: Any
) -> None:
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


def _bench(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.bench import distributed, report

    as_json, files = given.pop("json"), given.pop("report")
    if given.pop("distributed"):
        times = api.benchmark_together()
        if times:
            if as_json:
                return _print_json(asdict(times))
            print("\n".join(distributed.told(times)))
        return 0
    if files:
        return _bench_report(files, as_json)
    measured, paths = api.benchmark(**_present(given))
    if as_json:
        return _print_json({"reports": [str(path) for path in paths], **asdict(measured)})
    print(report.markdown(measured))
    _say(f"written to {paths[0]} and {paths[1].name}")
    return 0


def _bench_report(words: list[str], as_json: bool) -> int:
    """`mlxgpt bench report FILE…`: measurements side by side."""
    from mlxgpt.bench import side_by_side

    verb, *files = words
    if verb != "report" or not files:
        raise UserError(
            f"bench {' '.join(words)}: what to do is not clear",
            "say: mlxgpt bench, or mlxgpt bench report A.json B.json",
        )
    measured = side_by_side.read(files)
    if as_json:
        return _print_json([asdict(one) for one in measured])
    print(side_by_side.markdown(measured), end="")
    return 0


def _check(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    checks = api.check(**_one_tier(given))
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        from mlxgpt.cli.tables import show_checks

        show_checks(checks)
    return 1 if any(check.ok is False for check in checks) else 0


def _info(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    result = api.info(**_present(given))
    if as_json:
        return _print_json(asdict(result))
    from mlxgpt.cli.tables import show_info

    show_info(result)
    return 0


def _report(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json, what = given.pop("json"), given.pop("what")
    path = api.report(*what, **_present(given))
    if as_json:
        return _print_json({"page": path})
    print(path)
    return 0


def _play(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")

    def ready(address: str, key: str) -> None:
        if as_json:
            _print_json({"page": f"{address}/#{key}", "api": f"{address}/v1", "key": key})
            sys.stdout.flush()
        else:
            _say(f"the page, until Ctrl-C: {address}/#{key}")
            _say(f"for other programs: {address}/v1, as OpenAI's API, with the key {key}")

    api.play(ready=ready, browser=not given.pop("no_browser"), **_present(given))
    return 0


def _runs(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json, plotted = given.pop("json"), given.pop("plot")
    if plotted is not None:
        from mlxgpt.cli.tables import show_curve

        run = api.found(plotted, runs_dir=given["runs_dir"])
        if as_json:
            return _print_json(list(run.metrics()))
        show_curve(run)
        return 0
    lines = api.runs(**_present(given))
    if as_json:
        return _print_json([asdict(line) for line in lines])
    if not lines:
        where = api.home("runs", given["runs_dir"]).absolute()
        print(f"no runs in {where}; mlxgpt train --tier 1 makes one")
        return 0
    from mlxgpt.cli.tables import show_runs

    show_runs(lines)
    return 0


def _present(given: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line; the functions have the defaults."""
    return {name: value for name, value in given.items() if value is not None}


def _one_tier(given: dict[str, Any]) -> dict[str, Any]:
    """As `_present`; without a tier or a config, Tier 1."""
    present = _present(given)
    return present if "tier" in present or "config" in present else {"tier": 1, **present}


def _print_json(value: Any) -> int:
    plain = "utf" not in (sys.stdout.encoding or "").lower()  # JSON has a way to write the rest
    text = json.dumps(files.finite(value), default=str, ensure_ascii=plain)  # str: paths
    # Bytes of a name that are not UTF-8 are escaped, as JSON can.
    print(text.encode("utf-8", "backslashreplace").decode())
    return 0


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(line: str) -> None:
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
