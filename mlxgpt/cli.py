"""The front door: parse, call one function, print.

Flags of settings are made from the fields of config.py. Heavy imports stay inside the commands, so
that `--help` is quick. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict
from typing import Any, NoReturn

from mlxgpt import __version__, config, mac
from mlxgpt.errors import UserError

INTERRUPTED = 130
SECTION_TITLES = {
    "model": "model (GPT-2's shape)",
    "data": "data",
    "optim": "optimizer and schedule",
    "train": "training",
}


def run() -> NoReturn:
    """The program `mlxgpt`: as `main`, and ends the process."""
    try:
        code = main()
    except KeyboardInterrupt:  # a second one, while the first one was dealt with
        code = INTERRUPTED
    if code == INTERRUPTED:
        # At once: threads that still compute are not waited for.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        mac.refuse_others()
        parser = _parser()
        if not arguments:
            parser.print_help()
            return 0
        given = vars(parser.parse_args(arguments))
        command: Callable[[dict[str, Any], list[str]], int] = given.pop("run_command")
        return command(given, arguments)
    except UserError as error:
        _say(f"mlxgpt: {error.problem}\n  → {error.remedy}")
        return 2
    except KeyboardInterrupt:
        _say("mlxgpt: stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has closed it (`| head -1`). Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the world's doing, where no room could say it better
        where = f"{error.filename}: " if error.filename else ""
        _say(
            f"mlxgpt: {where}{error.strerror or error}\n  → free some space, or check permissions."
        )
        return 2


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are two lines: what is wrong, and what to do."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for sub in _subparsers(self, args) for flag in sub._option_string_actions]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.5)
            raise UserError(
                f"unknown argument {unknown[0]!r}",
                f"did you mean {near[0]}?" if near else f"see: {self.prog} --help",
            )
        return result

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see: {self.prog} --help")


def _subparsers(parser: argparse.ArgumentParser, args: Sequence[str]) -> list[_Parser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [sub for name, sub in action.choices.items() if name in args]
    return []


def _parser() -> _Parser:
    parser = _Parser(
        prog="mlxgpt",
        description="Train a GPT from nothing on your own Mac, understand it, and keep it.",
        epilog=(
            "begin here:\n"
            "  mlxgpt train --tier 1          train on Tiny Shakespeare, fetched on the way\n"
            '  mlxgpt generate "ROMEO:"       let the newest run write\n\n'
            "mlxgpt COMMAND --help explains one command."
        ),
    )
    parser.add_argument("--version", action="version", version=f"mlxgpt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[dict[str, Any], list[str]], int], help: str, text: str
    ) -> _Parser:
        sub: _Parser = commands.add_parser(name, help=help, description=text)
        sub.set_defaults(run_command=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
        return sub

    sub = add(
        "prepare",
        _prepare,
        "turn text into token arrays",
        "Turn text into token arrays in data/NAME. `train` does so on the way where it is needed.",
    )
    sub.add_argument(
        "source",
        nargs="*",
        help="shakespeare (default), storybook, or text files and folders of .txt files",
    )
    sub.add_argument(
        "--val-source", nargs="+", metavar="PATH", help="text to judge by; default: a part of it"
    )
    sub.add_argument("--tokenizer", help="char: one token a character (default)")
    sub.add_argument(
        "--megabytes", type=float, metavar="N", help="length of the storybook (default: 10)"
    )
    sub.add_argument("--name", help="the data folder's name (default: from the source)")
    _add_folders(sub, data=True)

    sub = add(
        "train",
        _train,
        "train a model, or resume a run",
        "Train a GPT. The same command again resumes a run that was stopped.\n\n"
        "  mlxgpt train --tier 1\n"
        "  mlxgpt train --tier 1 --source my.txt --max-minutes 10\n\n"
        "Every setting of the config has a flag; what isn't given comes from the tier's file.",
    )
    _add_recipe(sub)
    sub.add_argument("--run", metavar="NAME", help="the run's name (default: CONFIG-DATA)")
    sub.add_argument(
        "--max-minutes", type=float, metavar="M", help="plan as many steps as fit into M minutes"
    )
    _add_folders(sub, runs=True, data=True)
    _add_settings(sub)

    sub = add(
        "generate",
        _generate,
        "let a trained model write",
        "Continue a prompt with a trained model; without one, write from the beginning.\n\n"
        '  mlxgpt generate "ROMEO:"\n'
        '  mlxgpt generate "ROMEO:" --samples 3 --temperature 0.7 --seed 1',
    )
    sub.add_argument("prompt", nargs="?", default="", help="how the text begins")
    _add_run(sub)
    _add_folders(sub, runs=True)
    group = sub.add_argument_group("sampling")
    _add_flags(group, config.Sampling)

    sub = add(
        "eval",
        _eval,
        "judge a trained model",
        "Loss and bits per byte over the whole validation text, or over another text.",
    )
    _add_run(sub)
    sub.add_argument("--source", nargs="+", metavar="PATH", help="text files to judge by instead")
    _add_folders(sub, runs=True, data=True)

    sub = add(
        "check",
        _check,
        "see whether what must hold does hold",
        "Try the laws that training rests on, here and now, in seconds. `train` does so first.",
    )
    _add_recipe(sub)
    _add_settings(sub)

    sub = add(
        "info",
        _info,
        "what a tier or a run amounts to",
        "Parameters, cost and settings of a tier, a config or (default) the newest run.",
    )
    _add_recipe(sub)
    sub.add_argument("--run", metavar="NAME", help="a run's name or folder")
    _add_folders(sub, runs=True)
    _add_settings(sub)

    sub = add("runs", _runs, "list the runs", "All runs, the newest first.")
    _add_folders(sub, runs=True)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    tiers = sorted(int(n[4:]) for n in config.built_in() if n[:4] == "tier" and n[4:].isdecimal())
    help = "1: characters, Shakespeare, about 5 minutes on an M1"
    parser.add_argument("--tier", type=int, choices=tiers, help=help)
    parser.add_argument("--config", metavar="FILE", help="a TOML file instead of a tier")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="NAME", help="a run's name or folder (default: newest)")
    parser.add_argument(
        "--checkpoint", metavar="WHICH", help="best (default), newest, or a step number"
    )


def _add_folders(
    parser: argparse.ArgumentParser, *, runs: bool = False, data: bool = False
) -> None:
    if runs:
        parser.add_argument("--runs-dir", metavar="DIR", help="where runs lie (default: runs)")
    if data:
        parser.add_argument("--data-dir", metavar="DIR", help="where data lies (default: data)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for section, cls in config.SECTIONS.items():
        _add_flags(parser.add_argument_group(SECTION_TITLES[section]), cls)


def _add_flags(group: argparse._ArgumentGroup, cls: type) -> None:
    """One flag for each field; those that are not given leave no trace."""
    for name, kind, item in config.settings(cls):
        flag, default = "--" + name.replace("_", "-"), item.default
        shown = "" if default in (None, (), MISSING) else f" (default: {_shown(default)})"
        help = (item.metadata["help"] + shown).replace("%", "%%")
        common = {"default": argparse.SUPPRESS, "help": help}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif kind == tuple[str, ...] and name == "stop":
            group.add_argument(flag, action="append", metavar="TEXT", **common)
        elif kind == tuple[str, ...]:
            group.add_argument(flag, nargs="+", metavar="PATH", **common)
        elif kind is str:
            group.add_argument(flag, metavar="|".join(item.metadata["choices"]), **common)
        else:
            number, letter = (float, "X") if kind is float else (int, "N")
            group.add_argument(flag, type=number, metavar=letter, **common)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else f"{default}"


def _prepare(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json, source = given.pop("json"), given.pop("source")
    dataset = api.prepare(*source, note=_say, **_present(given))
    meta = dataset.meta
    if as_json:
        return _print_json({"folder": str(dataset.folder), **asdict(meta)})
    print(
        f"{dataset.folder}: {meta.train.tokens:,} tokens to train on, {meta.val.tokens:,} to judge "
        f"by, vocabulary {meta.vocab_size:,}"
    )
    return 0


def _train(given: dict[str, Any], arguments: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.display import TrainingDisplay

    as_json = given.pop("json")
    display = TrainingDisplay()
    try:
        summary = api.train(display=display, **_present(given))
    finally:
        display.close()
    if as_json:
        _print_json(asdict(summary))
    if summary.interrupted:
        _say(f"resume with: {shlex.join(['mlxgpt', *arguments])}")
        return INTERRUPTED
    return 0


def _generate(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    alone = given.get("samples", 1) == 1
    stream = _write if alone and not as_json else None
    result = api.generate(stream=stream, note=_say, **_present(given))
    if as_json:
        return _print_json(asdict(result))
    if alone:
        print()
    else:
        for number, text in enumerate(result.texts, 1):
            print(f"--- {number}\n{text}\n")
    _say(f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} a second, seed {result.seed}")
    return 0


def _eval(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    result = api.evaluate(note=_say, **_present(given))
    if as_json:
        return _print_json(asdict(result))
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"tokens         {result.tokens:,}")
    return 0


def _check(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    laws = api.check(**_one_tier(given))
    if as_json:
        _print_json([asdict(law) for law in laws])
    else:
        from mlxgpt.display import show_laws

        show_laws(laws)
    return 0 if all(law.ok for law in laws) else 1


def _info(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    result = api.info(**_present(given))
    if as_json:
        return _print_json(asdict(result))
    from mlxgpt.display import size

    print(f"{result.name}\n")
    for part, count in result.parameters.items():
        print(f"  {part:34}{count:>14,} parameters")
    print(f"\n  training, per token               {result.flops_per_token:>14,} operations")
    print(f"  training, in all                  {result.training_tokens:>14,} tokens")
    print(f"  weights, gradients, moments       {size(result.memory_bytes):>14}")
    if result.step is not None:
        print(f"  trained                           {result.step:>14,} steps")
    if result.val_loss is not None:
        print(f"  best validation loss              {result.val_loss:>14.4f} nats per token")
    print("\n" + config.to_toml(result.config))
    return 0


def _runs(given: dict[str, Any], _: list[str]) -> int:
    from mlxgpt import api

    as_json = given.pop("json")
    lines = api.runs(**_present(given))
    if as_json:
        return _print_json([asdict(line) for line in lines])
    if not lines:
        where = api.home("runs", given["runs_dir"]).absolute()
        print(f"no runs in {where}; mlxgpt train --tier 1 makes one")
        return 0
    from mlxgpt.display import show_table

    rows = [
        {
            "run": line.name,
            "steps": f"{line.step:,}/{line.steps:,}",
            "val loss": "–" if line.val_loss is None else f"{line.val_loss:.4f}",
            "parameters": f"{line.parameters:,}",
            "data": line.data,
        }
        for line in lines
    ]
    show_table(rows)
    return 0


def _present(given: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line; the functions have the defaults."""
    return {name: value for name, value in given.items() if value is not None}


def _one_tier(given: dict[str, Any]) -> dict[str, Any]:
    """As `_present`; without a tier or a config, Tier 1."""
    present = _present(given)
    return present if "tier" in present or "config" in present else {"tier": 1, **present}


def _print_json(value: Any) -> int:
    print(json.dumps(value, default=str, ensure_ascii=False))  # str: paths
    return 0


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
