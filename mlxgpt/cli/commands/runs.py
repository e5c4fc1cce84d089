"""`mlxgpt runs`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_folder_flags, add_run_flags
from mlxgpt.cli.output import print_json
from mlxgpt.utils.errors import UserError

HELP = "list the runs, or plot the loss of one"
DESCRIPTION = (
    "List all runs, newest first; or plot the loss of one.\n\n"
    "examples:\n"
    "  mlxgpt runs\n"
    "  mlxgpt runs --plot my-run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser, checkpoint=False)
    parser.add_argument(
        "--plot", action="store_true", help="plot the loss of RUN in the terminal (default: off)"
    )
    add_folder_flags(parser, runs=True)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.config.resolve import resolve_folder

    as_json, run_name = args.pop("json", False), args.pop("run", None)
    is_plot = args.pop("plot", False)
    if run_name is not None and not is_plot:
        raise UserError(
            f"mlxgpt runs lists all runs, not only {run_name}",
            f"use: mlxgpt info {shlex.quote(run_name)}, or to plot its loss add --plot.",
        )
    if is_plot:
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
