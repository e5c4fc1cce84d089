"""`mlxgpt bench`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.output import print_json, print_stderr

HELP = "measure training and generation speed"
DESCRIPTION = (
    "Measure the training and generation speed of Tier 1 and Tier 2 on this machine,\n"
    "each in a new process. Takes a few minutes; close other programs first. Writes a\n"
    "report that others can reproduce.\n\n"
    "examples:\n"
    "  mlxgpt bench\n"
    "  mlxgpt report A.json B.json           compare machines, as HTML\n"
    "  mlx.launch --hostfile hosts.json -- mlxgpt bench --distributed"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--tier", type=int, choices=(1, 2), help="measure only this tier (default: both)"
    )
    kind.add_argument(
        "--distributed",
        action="store_true",
        help="measure a training step of Tier 2 on several machines, or without mlx.launch on two "
        "processes of this machine (default: off)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the report (default: benchmarks/reports)",
    )


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.bench import distributed, report

    as_json = args.pop("json", False)
    if args.pop("distributed", False):
        result = api.benchmark_distributed()
        if result:
            if as_json:
                return print_json(asdict(result))
            print("\n".join(distributed.format_distributed_timing(result)))
        return 0
    measurement, paths = api.benchmark(**args)
    if as_json:
        return print_json({"reports": [str(path) for path in paths], **asdict(measurement)})
    print(report.render_benchmark_report(measurement))
    print_stderr(f"written to {paths[0]} and {paths[1].name}")
    return 0
