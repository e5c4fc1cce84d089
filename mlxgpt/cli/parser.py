"""An argument parser whose errors are two lines: what is wrong, and what to do."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from mlxgpt import __version__
from mlxgpt.cli.commands import (
    bench,
    check,
    compare,
    evaluate,
    export,
    generate,
    import_model,
    info,
    play,
    prepare,
    report,
    runs,
    train,
)
from mlxgpt.utils.errors import UserError


class Command(Protocol):
    """What a module in cli/commands has."""

    HELP: str
    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments; those that are not given must leave no trace."""

    def run(self, args: dict[str, Any], command_line: list[str]) -> int:
        """Run the command with the arguments that were given; its exit code."""


COMMANDS: dict[str, Command] = {
    "prepare": prepare,
    "train": train,
    "compare": compare,
    "import": import_model,
    "export": export,
    "generate": generate,
    "eval": evaluate,
    "check": check,
    "info": info,
    "runs": runs,
    "report": report,
    "play": play,
    "bench": bench,
}

DASH_PROMPT_HINT = (
    "a prompt that begins with a dash comes last: mlxgpt generate --seed 1 -- '--PROMPT'"
)


class CommandParser(argparse.ArgumentParser):
    """Raises a UserError for a mistake, and suggests the nearest flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        has_prompt = list(args[:1]) == ["generate"]
        if has_prompt and args[-1] == "--" and "--" not in args[:-1]:
            args = [*args, "--"]  # the prompt is `--`: a separator with nothing after it has no use
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [
                flag for sub in _find_subparsers(self, args) for flag in sub._option_string_actions
            ]
            suggestions = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.5)
            remedy = (
                f"did you mean {suggestions[0]}?" if suggestions else f"see: {self.prog} --help"
            )
            if has_prompt and "--" in args:
                remedy = DASH_PROMPT_HINT
            elif has_prompt and unknown[0].startswith("-"):
                remedy = (
                    f"did you mean {suggestions[0]}? If not, {DASH_PROMPT_HINT}"
                    if suggestions
                    else DASH_PROMPT_HINT
                )
            raise UserError(f"unknown argument {unknown[0]!r}", remedy)
        return parsed

    def error(self, message: str) -> NoReturn:
        remedy = f"see: {self.prog} --help"
        if "not allowed with argument" in message:
            remedy = "give one of them."
        elif "expected" in message and "argument" in message:
            remedy += "; a value that begins with a dash comes after =: --flag=-VALUE"
        elif "ignored explicit argument" in message and self.prog.endswith(" generate"):
            remedy = DASH_PROMPT_HINT
        raise UserError(message, remedy)


def make_parser() -> CommandParser:
    """The parser of `mlxgpt`; its result has `command`, and only what was given for it."""
    parser = CommandParser(
        prog="mlxgpt",
        description="Train a GPT from nothing on your own Mac, understand it, and keep it.",
        epilog=(
            "begin here:\n"
            "  mlxgpt train --tier 1          train on Tiny Shakespeare, fetched on the way\n"
            "  mlxgpt train --tier 2          train on short stories: a few hours\n"
            '  mlxgpt generate "ROMEO:"       let the newest run write\n\n'
            "mlxgpt COMMAND --help explains one command."
        ),
    )
    parser.add_argument("--version", action="version", version=f"mlxgpt {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            argument_default=argparse.SUPPRESS,
        )
        subparser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        command.add_arguments(subparser)
    return parser


def _find_subparsers(parser: argparse.ArgumentParser, args: Sequence[str]) -> list[CommandParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [sub for name, sub in action.choices.items() if name in args]
    return []
