from __future__ import annotations

from dataclasses import replace

from mlxgpt.reports import report
from mlxgpt.reports.roofline import allowed_of, roofline
from tests.reports import measured
from tests.reports.measured import cells


def test_the_smaller_of_peak_and_bandwidth_bounds() -> None:
    step = measured.counted()[0]  # 80 operations a byte
    allowed, by = allowed_of(step, 1e12, 1e9)
    assert (allowed, by) == (8e10, "bandwidth")
    assert allowed_of(step, 5e10, 1e9) == (5e10, "peak")


def test_where_each_workload_stands_by_hand() -> None:
    found = measured.measurement()
    tier = replace(found.tiers[0], counted=measured.counted())
    machine = replace(found.machine, bandwidth=1e9)
    found = replace(found, machine=machine, tiers=(tier,))
    # 8e8 operations in 2048 / 9970.8 s; 187.4e9 are the peak, and 80e9 the memory's.
    text = report.markdown(found)
    assert cells(text, "small, training step") == ["80.0", "80.0", "bandwidth", "3.89", "4.9 %"]
    # 5e5 for each of 812.2 tokens a second; half an operation a byte.
    assert cells(text, "small, decoded token") == ["0.500", "0.500", "bandwidth", "0.406", "81.2 %"]


def test_without_a_bandwidth_or_counts_there_is_none() -> None:
    found = measured.measurement()
    assert not list(roofline(found))
    assert not list(roofline(replace(found, machine=replace(found.machine, bandwidth=1e9))))
    assert "Roofline" not in report.markdown(found)
