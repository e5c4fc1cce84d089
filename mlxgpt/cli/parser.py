"""The argument parser, with two-line errors: the problem, and the remedy."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn, Protocol

from mlxgpt import __version__
from mlxgpt.cli.aliases import translate_args, unknown_command_error
from mlxgpt.cli.commands import (
    bench,
    chat,
    check,
    compare,
    doctor,
    evaluate,
    export,
    generate,
    import_model,
    info,
    learn,
    play,
    prepare,
    report,
    runs,
    scale,
    train,
)
from mlxgpt.cli.config_flags import HelpFormatter
from mlxgpt.utils.errors import UserError


class Command(Protocol):
    """Interface of the modules in cli/commands."""

    HELP: str
    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments, without defaults in the namespace."""

    def run(self, args: dict[str, Any], command_line: list[str]) -> int:
        """Run the command with the given arguments. Returns the exit code."""


COMMANDS: dict[str, Command] = {
    "prepare": prepare,
    "train": train,
    "compare": compare,
    "scale": scale,
    "import": import_model,
    "export": export,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "check": check,
    "info": info,
    "runs": runs,
    "report": report,
    "play": play,
    "bench": bench,
    "learn": learn,
    "doctor": doctor,
}

DASH_PROMPT_HINT = (
    "a prompt that begins with a dash comes last: mlxgpt generate --seed 1 -- '--PROMPT'"
)


class CommandParser(argparse.ArgumentParser):
    """Raises UserError for invalid arguments, accepts aliases from other tools, and suggests flags
    and commands.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        command = args[0] if args and not args[0].startswith("-") else ""
        has_prompt = command == "generate"
        if command:
            if command not in COMMANDS:
                raise unknown_command_error(command, list(COMMANDS))
            args = [command, *translate_args(command, args[1:], _find_flags(self, command))]
        if has_prompt and args[-1] == "--" and "--" not in args[:-1]:
            args = [*args, "--"]  # a final `--` is the prompt itself
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            is_flag = unknown[0].startswith("-")
            flags = list(_find_flags(self, command)) if is_flag else []
            suggestions = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.5)
            help_line = f"see: mlxgpt {command} --help".replace("  ", " ")
            remedy = f"did you mean {suggestions[0]}?" if suggestions else help_line
            if command == "bench" and unknown[0] == "report":
                remedy = "use: mlxgpt report FILE.json"
            elif command == "train" and not is_flag:
                remedy = _suggest_train_flag(unknown[0])
            elif has_prompt and "--" in args:
                remedy = DASH_PROMPT_HINT
            elif has_prompt and is_flag:
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
    """Build the parser of `mlxgpt`. The namespace has `command` and the given arguments only."""
    parser = CommandParser(
        prog="mlxgpt",
        description="Train a GPT from scratch on your Mac, inspect it, and export it.",
        epilog=(
            "examples:\n"
            "  mlxgpt train --tier 1          train on Tiny Shakespeare (downloaded first)\n"
            "  mlxgpt train --tier 2          train on TinyStories, a larger model\n"
            '  mlxgpt generate "ROMEO:"       generate text with the newest run\n\n'
            "help for one command: mlxgpt COMMAND --help"
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
        subparser.add_argument(
            "--json", action="store_true", help="print JSON only (default: text)"
        )
        command.add_arguments(subparser)
    return parser


def _suggest_train_flag(value: str) -> str:
    """Remedy for a value without its flag, such as nanoGPT's `train.py config/x.py`."""
    if value.isdecimal():
        return f"name the tier with its flag: --tier {value}."
    if value.endswith(".toml"):
        return f"name the config with its flag: --config {value}."
    if value.endswith(".py"):
        return "nanoGPT's configs are Python; name a TOML file: --config FILE.toml."
    return f"name the text with its flag: --source {value}."


def _find_flags(parser: argparse.ArgumentParser, command: str) -> dict[str, argparse.Action]:
    """All flags of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and command in action.choices:
            subparser = action.choices[command]
            return dict(subparser._option_string_actions)
    return {}
