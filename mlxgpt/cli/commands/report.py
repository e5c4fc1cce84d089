"""`mlxgpt report`."""

from __future__ import annotations

import argparse
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json

HELP = "write an HTML report of runs or benchmarks"
DESCRIPTION = (
    "Write one self-contained HTML file: a run's curves, samples and settings;\n"
    "several runs compared; or the results of `mlxgpt bench`, `compare` or `scale`.\n\n"
    "examples:\n"
    "  mlxgpt report my-run other-run --output both.html\n"
    "  mlxgpt report benchmarks/reports/mine.json\n"
    "  mlxgpt report --watch                  update it while the newest run trains"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="RUN|FILE.json",
        help="names or folders of runs, or JSON files of bench, compare or scale (default: newest "
        "run)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="file to write (default: report.html in the run's folder, or here for several runs; "
        "for a JSON file, the same name with .html)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="update the report every few seconds until the run is finished (default: off)",
    )
    parser.add_argument("--lang", choices=("en", "pt"), help="language of the report (default: en)")
    add_folder_flags(parser, runs=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json, targets = args.pop("json", False), args.pop("what", ())
    path = api.report(*targets, **args)
    if as_json:
        return print_json({"page": path})
    print(path)
    return 0
