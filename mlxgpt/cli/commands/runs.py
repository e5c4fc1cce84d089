"""`mlxgpt runs`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags
from mlxgpt.cli.output import print_json

HELP = "list the runs"
DESCRIPTION = "All runs, the newest first; or the curve of one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="RUN", help="draw the loss of a run, by name or folder")
    add_folder_flags(parser, runs=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.config.resolve import resolve_folder

    as_json, run_name = args.pop("json", False), args.pop("plot", None)
    if run_name is not None:
        from mlxgpt.cli.tables import show_curve
        from mlxgpt.storage.run import find_run

        run = find_run(run_name, resolve_folder("runs", args.get("runs_dir")))
        if as_json:
            return print_json(list(run.metrics()))
        show_curve(run)
        return 0
    summaries = api.runs(**args)
    if as_json:
        return print_json([asdict(summary) for summary in summaries])
    if not summaries:
        folder = resolve_folder("runs", args.get("runs_dir")).absolute()
        print(f"no runs in {folder}; mlxgpt train --tier 1 makes one")
        return 0
    from mlxgpt.cli.tables import show_runs

    show_runs(summaries)
    return 0
