"""`mlxgpt chat`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from mlxgpt import config
from mlxgpt.cli.config_flags import (
    add_dataclass_flags,
    add_folder_flags,
    add_quantize_flag,
    add_run_flags,
)
from mlxgpt.cli.output import print_stderr, write_stdout
from mlxgpt.utils.errors import UserError

HELP = "talk with a model that has a chat template"
DESCRIPTION = (
    "Talk with a model that has a chat template. It sees the whole conversation, or\n"
    "as much of its end as fits into its context.\n\n"
    "examples:\n"
    "  mlxgpt chat\n"
    '  mlxgpt chat mine --system "You are a pirate." --temperature 0.7'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    parser.add_argument(
        "--system", metavar="TEXT", help="system message, before the conversation (default: none)"
    )
    add_quantize_flag(parser)
    add_folder_flags(parser, runs=True, data=True)
    add_dataclass_flags(parser.add_argument_group("sampling"), config.SamplingParams)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt.cli.chat_repl import ChatRepl
    from mlxgpt.cli.repl import run_repl

    if args.pop("json", False) or "samples" in args:
        raise UserError("chat prints one reply after the other", "omit --samples and --json.")
    make_repl = partial(ChatRepl, system=args.pop("system", ""))
    run_repl(make_repl, args, write_stdout, print_stderr)
    return 0
