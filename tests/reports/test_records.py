from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from mlxgpt.errors import UserError
from mlxgpt.reports import report
from mlxgpt.reports.records import Measurement, Spread
from mlxgpt.rivals.record import Contest
from tests.commands import ROOT
from tests.reports import measured


@pytest.fixture
def measurement() -> Measurement:
    return measured.measurement()


def test_a_spread_is_the_median_the_least_and_the_most() -> None:
    assert Spread.of([9.0, 1.0, 2.0, 100.0, 3.0]) == Spread(3.0, 1.0, 100.0, (9, 1, 2, 100, 3))


def test_json_gives_the_measurement_back(measurement: Measurement) -> None:
    again = Measurement.from_json(measurement.to_json())
    assert again == measurement
    assert report.markdown(again) == report.markdown(measurement)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"format": 2', '"format": 3'),
        lambda text: text.replace('"chip"', '"chop"'),
        lambda text: text.replace('"ms_per_step"', '"ms"'),
    ],
)
def test_other_json_is_refused(damage: Callable[[str], str], measurement: Measurement) -> None:
    with pytest.raises(UserError, match="no measurement"):
        Measurement.from_json(damage(measurement.to_json()))


def test_what_came_later_is_given_back_too(measurement: Measurement) -> None:
    contest = Contest("small", "generate", 8, {"mlxgpt": [{"tokens_per_second": 7.5}]}, {}, {})
    tiers = tuple(replace(tier, counted=measured.counted()) for tier in measurement.tiers)
    machine = replace(measurement.machine, bandwidth=39.3e9)
    whole = replace(measurement, tiers=tiers, machine=machine, contests=(contest,))
    assert Measurement.from_json(whole.to_json()) == whole


def test_a_file_of_the_first_format_is_read(measurement: Measurement) -> None:
    """As those that were committed before there were rivals and counts."""
    tree = json.loads(measurement.to_json())
    tree["format"] = 1
    del tree["contests"], tree["machine"]["bandwidth"]
    for tier in tree["tiers"]:
        del tier["counted"]
    assert Measurement.from_json(json.dumps(tree)) == measurement
    for file in (ROOT / "benchmarks" / "reports").glob("20*.json"):
        assert Measurement.from_json(file.read_text(encoding="utf-8")).tiers
