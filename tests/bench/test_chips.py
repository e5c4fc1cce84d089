from __future__ import annotations

import pytest

from mlxgpt.bench import chips, report
from mlxgpt.bench.chips import CHIPS, Chip
from mlxgpt.bench.records import Measurement
from tests.helpers import bench_measurement
from tests.helpers.bench_measurement import table_cells


@pytest.fixture
def measurement() -> Measurement:
    return bench_measurement.make_measurement()


def test_estimates_equal_values_computed_by_hand(measurement: Measurement) -> None:
    small, large = measurement.tiers
    m1, m3_max = CHIPS[0], next(chip for chip in CHIPS if chip.name == "M3 Max")
    assert m1 == Chip("M1", 2.6, (68,))
    # 0.25 * 2.6e12 FLOP/s / 2.5e6 FLOPs per token; 68e9 bytes/s / 4e6 bytes per token.
    assert chips.estimate_training_speed(m1, small) == pytest.approx(260_000)
    assert chips.max_generation_speed(m1, small) == pytest.approx((17_000,))
    assert chips.estimate_training_speed(m1, large) == pytest.approx(10_000)
    text = report.render_benchmark_report(measurement)
    # 36e6 tokens take 138 s at 260,000 tokens/s, and an hour at 10,000 tokens/s.
    assert table_cells(text, "M1", 0) == ["2.6", "68", "260,000", "2.3 min", "17,000"]
    assert table_cells(text, "M1", 1) == ["2.6", "68", "10,000", "1.0 h", "1,400"]
    assert table_cells(text, "M1 Ultra", 0)[3] == "17 s"
    assert m3_max.gb_per_second == (300, 400)
    assert table_cells(text, "M3 Max", 1)[1::3] == ["300 to 400", "6,000 to 8,000"]
    assert table_cells(text, "M5 Max", 1)[1::3] == ["–", "–"], (
        "its bandwidth is in no source of ours"
    )


def test_chips_match_the_spec_sheets() -> None:
    names = [chip.name for chip in CHIPS]
    assert len(names) == len(set(names)) == 18
    assert "M4 Ultra" not in names
    assert Chip("M3 Ultra", 28.4, (819,)) in CHIPS
    assert Chip("M4 Max", 18.4, (410, 546)) in CHIPS
    assert Chip("M5", 5.7, ()) in CHIPS


def test_only_estimates_are_marked_as_estimated(measurement: Measurement) -> None:
    bench_measurement, estimated = report.render_benchmark_report(measurement).split(
        "## Apple chips: *estimated*"
    )
    assert "estimated" not in bench_measurement
    assert all(chip.name + " " not in bench_measurement for chip in CHIPS)
    heads = [x for x in estimated.splitlines() if x.startswith("| chip")]
    assert len(heads) == 2
    for head in heads:
        for title in head.strip("|").split("|")[3:]:
            assert "*estimated*" in title
    assert "### small, *estimated*" in estimated
    assert "### large, *estimated*" in estimated
    smaller = "This model is smaller than any of those measured"
    assert smaller in estimated.split("### large")[0], "1M parameters: nobody measured so few"
    assert smaller not in estimated.split("### large")[1]
