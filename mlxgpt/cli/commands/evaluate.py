"""`mlxgpt eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags, add_run_flags
from mlxgpt.cli.output import print_json, print_stderr
from mlxgpt.utils.errors import UserError

HELP = "evaluate a trained model: loss and bits per byte"
DESCRIPTION = (
    "Evaluate a run on its whole validation text, or on another text. Put RUN first.\n\n"
    "examples:\n"
    "  mlxgpt eval\n"
    "  mlxgpt eval my-run --source other.txt\n"
    "  mlxgpt eval my-run --hellaswag --limit 500"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--source",
        nargs="+",
        metavar="PATH",
        help="text to evaluate on (default: the run's validation text)",
    )
    text.add_argument(
        "--hellaswag",
        nargs="?",
        const="",
        metavar="FILE",
        help="HellaSwag accuracy: on the 10,042 validation examples, or on a file in that format "
        "(default: off)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="first N HellaSwag examples (default: all)"
    )
    text.add_argument(
        "--quality",
        action="store_true",
        help="generate samples, and compare their quality metrics with real text and two controls "
        "(default: off)",
    )
    add_folder_flags(parser, runs=True, data=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.cli import tables

    as_json, hellaswag_file = args.pop("json", False), args.pop("hellaswag", None)
    if "limit" in args and hellaswag_file is None:
        raise UserError("--limit belongs to --hellaswag", "leave it out, or add --hellaswag.")
    result: Any
    if args.pop("quality", False):
        result = api.appraise(**args)
        show: Callable[[Any], None] = tables.show_appraisal
    elif hellaswag_file is not None:
        args.pop("data_dir", None)
        from mlxgpt.cli.progress import CountingDisplay

        with CountingDisplay("examples") as display:
            result = api.hellaswag(
                file=hellaswag_file or None, progress=display.show_progress, **args
            )
        show = tables.show_hellaswag
    else:
        result = api.evaluate(**args)
        show = tables.show_evaluation
    if as_json:
        return print_json(asdict(result))
    show(result)
    if hellaswag_file is not None:
        print_stderr(
            "a guess: 0.25; GPT-2 124M by the same rule, in build-nanogpt: 0.2859, norm 0.2955"
        )
    return 0
