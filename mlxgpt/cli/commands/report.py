"""`mlxgpt report`."""

from __future__ import annotations

import argparse
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json

HELP = "a page to look at, and to show"
DESCRIPTION = (
    "Write one HTML file, which fetches nothing: how a run went, with its curves, samples and\n"
    "settings; several runs side by side; or a benchmark, or a comparison.\n\n"
    "  mlxgpt report mine other --output both.html\n"
    "  mlxgpt report benchmarks/reports/mine.json\n"
    "  mlxgpt report --watch                  while it trains, the newest run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="RUN|FILE.json",
        help="runs' names or folders (default: newest), or what bench or compare wrote",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="default: report.html, in the run's folder or here; or beside the JSON file",
    )
    parser.add_argument(
        "--watch", action="store_true", help="write it again every few seconds until it is finished"
    )
    add_folder_flags(parser, runs=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json, targets = args.pop("json", False), args.pop("what", ())
    path = api.report(*targets, **args)
    if as_json:
        return print_json({"page": path})
    print(path)
    return 0
