from __future__ import annotations

import json
from importlib.metadata import version

import metal_counts
import pytest

from mlxgpt.machine.device import on_cpu


def test_what_is_committed_is_what_is_counted() -> None:
    """A change that asks more of Metal, or less, is a change of these files too."""
    told = json.loads((metal_counts.FOLDER / "metal-counts.json").read_text())
    if told["mlx"] != version("mlx"):
        pytest.skip(f"counted with mlx {told['mlx']}, and other versions trace other graphs")
    if not on_cpu():
        pytest.skip("counted on a CPU; whether a GPU's own graphs are the same nobody has seen yet")
    found = metal_counts.as_tree(metal_counts.counted())
    for name, workloads in found["counted"].items():
        for now, then in zip(workloads, told["counted"][name], strict=True):
            assert now == then, f"{name}, {now['name']}: python benchmarks/metal_counts.py"
    assert found == told


def test_the_bound_lies_above_what_was_measured_elsewhere() -> None:
    rows = metal_counts._tests()[1:]
    assert len(rows) == len(metal_counts.ELSEWHERE)
    for *_, share in rows:
        assert 50 < float(share.removesuffix(" %")) < 100
