from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from mlxgpt.bench import report
from mlxgpt.bench.records import Measurement, SummaryStats
from mlxgpt.utils.errors import UserError
from tests.helpers import bench_measurement
from tests.helpers.commands import ROOT


@pytest.fixture
def measurement() -> Measurement:
    return bench_measurement.make_measurement()


def test_stats_are_median_least_and_most() -> None:
    assert SummaryStats.from_values([9.0, 1.0, 2.0, 100.0, 3.0]) == SummaryStats(
        3.0, 1.0, 100.0, (9, 1, 2, 100, 3)
    )


def test_json_round_trip(measurement: Measurement) -> None:
    restored = Measurement.from_json(measurement.to_json())
    assert restored == measurement
    assert report.render_benchmark_report(restored) == report.render_benchmark_report(measurement)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"format": 3', '"format": 0'),
        lambda text: text.replace('"chip"', '"chop"'),
        lambda text: text.replace('"ms_per_step"', '"ms"'),
    ],
)
def test_invalid_json_is_refused(damage: Callable[[str], str], measurement: Measurement) -> None:
    with pytest.raises(UserError, match="not a valid benchmark result"):
        Measurement.from_json(damage(measurement.to_json()))


def test_json_round_trip_with_bandwidth(measurement: Measurement) -> None:
    machine = replace(measurement.machine, bandwidth=39.3e9)
    expected = replace(measurement, machine=machine)
    assert Measurement.from_json(expected.to_json()) == expected


def test_files_of_earlier_formats_are_read(measurement: Measurement) -> None:
    """Including the committed ones. Format 2 contained kernel counts and other libraries."""
    tree = json.loads(measurement.to_json())
    tree["format"] = 1
    del tree["machine"]["bandwidth"]
    assert Measurement.from_json(json.dumps(tree)) == measurement
    tree["format"] = 2
    tree["contests"] = [{"config": "tier1", "what": "training"}]
    for tier in tree["tiers"]:
        tier["counted"] = [{"name": "training step", "kernels": []}]
    assert Measurement.from_json(json.dumps(tree)) == measurement
    for file in (ROOT / "benchmarks" / "reports").glob("20*.json"):
        assert Measurement.from_json(file.read_text(encoding="utf-8")).tiers
