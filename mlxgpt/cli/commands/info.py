"""`mlxgpt info`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_config_flags, add_folder_flags, add_tier_flags
from mlxgpt.cli.output import print_json

HELP = "what a tier or a run amounts to"
DESCRIPTION = "Parameters, cost and settings of a tier, a config or (default) the newest run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tier_flags(parser)
    parser.add_argument("--run", metavar="NAME", help="a run's name or folder")
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
