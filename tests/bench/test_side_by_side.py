from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt.bench import side_by_side
from mlxgpt.utils.errors import UserError
from tests.helpers import bench_measurement
from tests.helpers.bench_measurement import table_cells


def test_machines_are_compared_side_by_side(tmp_path: Path) -> None:
    first = bench_measurement.make_measurement()
    fast = replace(first.tiers[0].training, tokens_per_second=54_321.0)
    faster = replace(first.tiers[0], training=fast)
    machine = replace(first.machine, chip="Apple M1 Max", backend="metal", bandwidth=400e9)
    second = replace(first, machine=machine, tiers=(faster,))
    paths = []
    for name, measurement in (("a", first), ("b", second)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(measurement.to_json(), encoding="utf-8")
    assert side_by_side.read_measurements(paths) == [first, second]
    text = side_by_side.render_machine_comparison(side_by_side.read_measurements(paths))
    assert table_cells(text, "") == ["1: Intel(R) Xeon(R) Processor", "2: Apple M1 Max"]
    assert table_cells(text, "MLX device") == ["cpu", "metal"]
    assert table_cells(text, "measured memory bandwidth") == ["–", "400 GB/s"]
    assert table_cells(text, "training, tokens/s") == ["9,970", "54,300"]
    assert table_cells(text, "training, tokens/s", 1) == ["9,970", "–"], (
        "the other has no large tier"
    )


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        side_by_side.read_measurements([tmp_path / "nothing.json"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: this is not a valid benchmark result"):
        side_by_side.read_measurements([tmp_path / "other.json"])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*binary\.json"):
        side_by_side.read_measurements([tmp_path / "binary.json"])
