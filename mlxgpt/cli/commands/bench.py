"""`mlxgpt bench`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.output import print_json, print_stderr

HELP = "how fast both tiers are here"
DESCRIPTION = (
    "Measure training and generation of Tier 1 and Tier 2 on this machine, each in a fresh\n"
    "process, in a few minutes; best with nothing else running. Writes a report that others\n"
    "can reproduce.\n\n"
    "  mlxgpt bench report A.json B.json     machines side by side\n"
    "  mlx.launch --hostfile hosts.json -- mlxgpt bench --distributed"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report = parser.add_subparsers(dest="action", metavar="report", required=False).add_parser(
        "report", help="show measurements from files, side by side"
    )
    report.add_argument("files", nargs="+", metavar="FILE", help="what bench wrote")
    report.add_argument("--json", action="store_true", help="print JSON and nothing else")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tier", type=int, choices=(1, 2), help="measure only this tier")
    kind.add_argument(
        "--distributed",
        action="store_true",
        help="measure a training step of Tier 2 on several machines instead, or on two processes "
        "of this one",
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (default: benchmarks/reports)")


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt import api
    from mlxgpt.bench import distributed, report

    as_json = args.pop("json", False)
    if args.pop("action", None):
        return _show_reports(args["files"], as_json)
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


def _show_reports(paths: list[str], as_json: bool) -> int:
    """`mlxgpt bench report FILE…`: measurements side by side."""
    from mlxgpt.bench import side_by_side

    measurements = side_by_side.read_measurements(paths)
    if as_json:
        return print_json([asdict(measurement) for measurement in measurements])
    print(side_by_side.render_machine_comparison(measurements), end="")
    return 0
