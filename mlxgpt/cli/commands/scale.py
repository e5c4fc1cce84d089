"""`mlxgpt scale`."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from mlxgpt.cli.config_flags import add_config_flags, add_folder_flags
from mlxgpt.cli.output import EXIT_INTERRUPTED, print_json, print_stderr

HELP = "fit a scaling law: which size for which training time"
DESCRIPTION = (
    "Train models of several sizes for several lengths on this machine, fit how the\n"
    "loss falls with parameters and tokens, and test the law on a larger model. The\n"
    "same command resumes an interrupted study; no run is trained twice. If the test\n"
    "is as predicted, `mlxgpt train --max-minutes` on the same text uses the law.\n\n"
    "examples:\n"
    "  mlxgpt scale --budget 2h\n"
    "  mlxgpt scale --budget 30m --source my.txt --recipe modern"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        required=True,
        metavar="B",
        help="time for all runs together: 30m, 2h (required)",
    )
    parser.add_argument(
        "--recipe",
        choices=["modern", "racing"],
        help="recipe of the models (default: racing)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="seeds per size and length (default: 3)"
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the folder in runs/compare (default: from data, recipe and budget)",
    )
    add_folder_flags(parser, runs=True, data=True)
    add_config_flags(parser)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli.study_view import StudyDisplay, show_scaling
    from mlxgpt.experiments.results import record_to_tree

    as_json = args.pop("json", False)
    with StudyDisplay() as display:
        record = api.scale(callbacks=[display], **args)
    if as_json:
        print_json(record_to_tree(record))
    else:
        show_scaling(record)
    if record.interrupted:
        print_stderr(f"resume with: {shlex.join(['mlxgpt', *command_line])}")
        return EXIT_INTERRUPTED
    return 0
