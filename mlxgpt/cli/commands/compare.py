"""`mlxgpt compare`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_config_flags, add_folder_flags, add_tier_flags
from mlxgpt.cli.output import EXIT_INTERRUPTED, print_json, print_stderr

HELP = "which of several settings is better, with its error"
DESCRIPTION = (
    "Train variants side by side, the same seeds and the same order of the text for each, and\n"
    "say which is better. They are judged on the end of the training text, which is held\n"
    "back. Interrupted, the same command goes on; nothing is trained twice.\n\n"
    "  mlxgpt compare --vary dropout=0,0.1,0.2 --tier 1 --budget 5m\n"
    "  mlxgpt compare tier1 mine.toml --source my.txt --budget 2Mtokens --until-decided"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    variants = parser.add_mutually_exclusive_group()
    variants.add_argument(
        "variants",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="configs, two or more; the first is what the others are compared with",
    )
    variants.add_argument(
        "--vary",
        metavar="FIELD=X,Y,…",
        help="one setting's values instead, the others from --tier or --config",
    )
    add_tier_flags(parser)
    parser.add_argument(
        "--budget",
        required=True,
        metavar="B",
        help="how long each one trains: 5m, 10Mtokens or 2000steps; its schedule is as long",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds of each (default: 3; until decided: at most 20)",
    )
    parser.add_argument(
        "--until-decided",
        action="store_true",
        help="add seeds, up to --seeds, until it is decided; who is clearly worse gets no more",
    )
    parser.add_argument(
        "--smallest",
        type=float,
        metavar="X",
        help="a difference in bits per byte too small to go on for",
    )
    parser.add_argument(
        "--final",
        action="store_true",
        help="judge on the validation text; how often that was done stands in the ledger",
    )
    parser.add_argument(
        "--name", help="the folder's name in runs/compare (default: from the variants)"
    )
    add_folder_flags(parser, runs=True, data=True)
    add_config_flags(parser)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.compare_view import ComparisonDisplay, show_comparison

    as_json, variants = args.pop("json", False), args.pop("variants", ())
    with ComparisonDisplay() as display:
        record = api.compare(*variants, callbacks=[display], **args)
    if as_json:
        print_json(asdict(record))
    else:
        show_comparison(record)
    if record.interrupted:
        print_stderr(f"resume with: {shlex.join(['mlxgpt', *command_line])}")
        return EXIT_INTERRUPTED
    return 0
