"""`mlxgpt check`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.config_flags import add_config_flags, add_tier_flags
from mlxgpt.cli.output import print_json

HELP = "check that the model and the training step are correct"
DESCRIPTION = (
    "Check that the model, the gradients and the optimizer are correct on this\n"
    "machine. Takes seconds; `train` runs the same checks first.\n\n"
    "examples:\n"
    "  mlxgpt check\n"
    "  mlxgpt check --tier 2 --recipe modern"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tier_flags(parser, default="1")
    add_config_flags(parser)


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api

    as_json = args.pop("json", False)
    if not {"tier", "config"} & args.keys():
        args["tier"] = 1
    checks = api.check(**args)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        from mlxgpt.cli.tables import show_checks

        show_checks(checks)
    return 1 if any(check.ok is False for check in checks) else 0
