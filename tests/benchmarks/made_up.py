"""A Mac, a lab and checks, made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mac_report_lab import Lab, Plan

from mlxgpt.reports.records import Machine

MAC = Machine(
    chip="Apple M1 Pro",
    backend="metal",
    cores=10,
    performance_cores=8,
    memory=17_179_869_184,
    system="macOS-14.5-arm64-arm-64bit",
    blas="MLX's own",
    versions={"mlxgpt": "0.1.0", "mlx": "0.32.4", "numpy": "2.4.1", "Python": "3.12.4"},
    commit="0123456789ab",
    load=1.234,
    bandwidth=180e9,
)


def new_lab(home: Path, **plan: Any) -> Lab:
    home.mkdir(exist_ok=True)
    return Lab(replace(Plan(), **plan), home, None)


def checks(*oks: bool | None) -> list[dict[str, Any]]:
    return [{"name": f"check {n}", "ok": ok, "detail": "seen"} for n, ok in enumerate(oks)]
