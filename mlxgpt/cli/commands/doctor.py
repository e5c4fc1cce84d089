"""`mlxgpt doctor`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mlxgpt.cli.output import print_json, print_stderr

HELP = "describe this machine and the newest run, for an issue"
DESCRIPTION = (
    "Print what an issue needs: versions, device, memory, free disk, the self-check,\n"
    "and the newest run's history and losses. Names, folders and texts are left out.\n\n"
    "examples:\n"
    "  mlxgpt doctor\n"
    "  mlxgpt doctor --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: dict[str, Any], command_line: list[str]) -> int:
    from mlxgpt.bench import doctor  # not from api, which imports MLX

    report: dict[str, list[doctor.Finding]] = {}
    for part in doctor.PARTS:
        print_stderr(f"{part} …")
        report[part] = doctor.run_part(part)
    if args.get("json"):
        print_json({part: [asdict(f) for f in findings] for part, findings in report.items()})
    else:
        print_stderr("paste this into your issue; check first that nothing in it is private\n")
        print(doctor.render_findings(report))
    return int(any(f.ok is False for findings in report.values() for f in findings))
