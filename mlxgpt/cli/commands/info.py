"""`mlxgpt info`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import (
    add_config_flags,
    add_folder_flags,
    add_run_flags,
    add_tier_flags,
)
from mlxgpt.cli.output import print_json

HELP = "show the size, cost and settings of a tier or a run"
DESCRIPTION = (
    "Show the parameters, cost and settings of a run, a tier or a config.\n\n"
    "examples:\n"
    "  mlxgpt info\n"
    "  mlxgpt info my-run\n"
    "  mlxgpt info --tier 2 --n-layer 8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_flags(parser, checkpoint=False)
    add_tier_flags(parser, default="the newest run")
    add_folder_flags(parser, runs=True)
    add_config_flags(parser)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json", False)
    result = api.info(**args)
    if as_json:
        return print_json(asdict(result))
    from mlxgpt.cli.tables import show_info

    show_info(result)
    return 0
