from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlxgpt.pages.measurements import page_of
from mlxgpt.reports.records import Measurement
from mlxgpt.rivals.record import US, Contest
from tests.pages.test_page import HOSTILE, Seen
from tests.reports.measured import counted, measurement


def figures(speed: float) -> dict[str, float]:
    """Of one round."""
    times = {"ms_to_first_token": 1.0, "seconds_from_start": 1.0}
    return {"tokens_per_second": speed, "peak_memory": 1e8, **times}


ROUNDS = {US: [figures(300.0)] * 3, "PyTorch": [figures(v) for v in (100.0, 150.0, 200.0)]}
CONTEST = Contest(
    "small", "generate", 8, ROUNDS, {US: {"versions": "1"}, "PyTorch": {"versions": "2"}}
)


def whole(**machine: Any) -> Measurement:
    """A measurement with all that there is, on a machine with something changed."""
    one = measurement()
    tiers = tuple(replace(tier, counted=counted()) for tier in one.tiers)
    changed = replace(one.machine, bandwidth=5e10, **machine)
    return replace(one, machine=changed, tiers=tiers, contests=(CONTEST,))


def test_one_machine_with_its_roofline_and_rivals() -> None:
    html = page_of([whole()]).html()
    told = Seen(html).text
    for words in ("measured and predicted", "Roofline", "Beside others", "To measure it again"):
        assert words in told, words
    assert "small, 8 texts: PyTorch" in told
    assert "How many times as fast we are. small, 8 texts: PyTorch: 2.00" in html
    assert "Predicted, from" in html
    assert "hollow is predicted, and measured by nobody" in told


def test_without_bandwidth_there_is_no_roofline() -> None:
    html = page_of([measurement()]).html()
    assert "Roofline" not in html
    assert "<svg" in html


def test_machines_side_by_side() -> None:
    other = whole(chip="Apple M4")
    told = Seen(page_of([whole(), replace(other, tiers=other.tiers[:1])]).html()).text
    assert "2: what Apple M4 allows" in told
    assert "Apple M4, 2026-11-22" in told


def test_a_chip_s_name_is_text() -> None:
    html = page_of([whole(chip=f"{HOSTILE} ![x](http://e.vil)")]).html()
    assert "<script" not in html
    assert "<img" not in html
