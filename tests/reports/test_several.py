from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxgpt.errors import UserError
from mlxgpt.reports import several
from mlxgpt.rivals.record import Contest
from tests.reports import measured
from tests.reports.measured import cells


def test_machines_stand_side_by_side(tmp_path: Path) -> None:
    one = measured.measurement()
    fast = replace(one.tiers[0].training, tokens_per_second=54_321.0)
    counted = replace(one.tiers[0], training=fast, counted=measured.counted())
    machine = replace(one.machine, chip="Apple M1 Max", backend="metal", bandwidth=400e9)
    two = replace(one, machine=machine, tiers=(counted,))
    paths = []
    for name, measurement in (("a", one), ("b", two)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(measurement.to_json(), encoding="utf-8")
    assert several.read(paths) == [one, two]
    text = several.markdown(several.read(paths))
    assert cells(text, "") == ["1: Intel(R) Xeon(R) Processor", "2: Apple M1 Max"]
    assert cells(text, "MLX computes on") == ["cpu", "metal"]
    assert cells(text, "bandwidth, measured") == ["–", "400 GB/s"]
    assert cells(text, "training, tokens/s") == ["9,970", "54,300"]
    assert cells(text, "training, tokens/s", 1) == ["9,970", "–"], "the other has no large tier"
    assert cells(text, "2: small, training step")[-1].endswith(" %")
    assert "1: small, training step" not in text


def test_what_was_measured_beside_others_is_shown() -> None:
    contest = Contest("small", "preparation", 0, {"mlxgpt": [figures(3.0)]})
    one = replace(measured.measurement(), contests=(contest,))
    assert "### small, text made ready" in several.markdown([one])


def figures(rate: float) -> dict[str, float]:
    return {"megabytes_per_second": rate, "peak_memory": 1e8}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        several.read([tmp_path / "nothing.json"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: this is no measurement"):
        several.read([tmp_path / "other.json"])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*binary\.json"):
        several.read([tmp_path / "binary.json"])
