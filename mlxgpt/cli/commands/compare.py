"""`mlxgpt compare`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from mlxgpt.cli.config_flags import add_config_flags, add_folder_flags, add_tier_flags
from mlxgpt.cli.output import EXIT_INTERRUPTED, print_json, print_stderr

HELP = "train variants and compare them, with confidence intervals"
DESCRIPTION = (
    "Train variants with the same seeds and the same batches, and report which is\n"
    "better. They are evaluated on a held-out part of the training text. The same\n"
    "command resumes an interrupted comparison; no run is trained twice.\n\n"
    "examples:\n"
    "  mlxgpt compare --vary dropout=0,0.1,0.2 --tier 1 --budget 5m\n"
    "  mlxgpt compare tier1 mine.toml --budget 2Mtokens --until-decided"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    variants = parser.add_mutually_exclusive_group()
    variants.add_argument(
        "variants",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="two or more configs; the first is the baseline",
    )
    variants.add_argument(
        "--vary",
        metavar="FIELD=X,Y,…",
        help="instead of files: the values of one setting; the other settings come from --tier or "
        "--config (default: none)",
    )
    add_tier_flags(parser)
    parser.add_argument(
        "--budget",
        required=True,
        metavar="B",
        help="training length of each variant, and of its schedule: 5m, 10Mtokens or 2000steps "
        "(required)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds per variant (default: 3; with --until-decided: up to 20)",
    )
    parser.add_argument(
        "--until-decided",
        action="store_true",
        help="add seeds, up to --seeds, until the difference is significant; variants that are "
        "clearly worse get no more (default: off)",
    )
    parser.add_argument(
        "--min-effect",
        type=float,
        metavar="X",
        help="with --until-decided, stop when the difference is below X bits per byte (default: 0)",
    )
    parser.add_argument(
        "--on-validation",
        action="store_true",
        help="evaluate on the validation text; each use is counted (default: off)",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the folder in runs/compare (default: from the variants)",
    )
    add_folder_flags(parser, runs=True, data=True)
    add_config_flags(parser)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.study_view import StudyDisplay, show_comparison
    from mlxgpt.experiments.results import record_to_tree

    as_json, variants = args.pop("json", False), args.pop("variants", ())
    with StudyDisplay() as display:
        record = api.compare(*variants, callbacks=[display], **args)
    if as_json:
        print_json(record_to_tree(record))
    else:
        show_comparison(record)
    if record.interrupted:
        print_stderr(f"resume with: {shlex.join(['mlxgpt', *command_line])}")
        return EXIT_INTERRUPTED
    return 0
