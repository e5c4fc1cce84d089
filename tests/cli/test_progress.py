from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlxgpt.cli import progress
from mlxgpt.cli.progress import PreparationDisplay, format_duration


def test_preparation_shows_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    display = PreparationDisplay()
    for seconds, megabytes in ((100, 10), (105, 60), (111, 70), (112, 80), (122, 125)):
        clock.now = seconds
        display.show_progress("encoding", megabytes * 1_000_000, 1_000_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "now and then"
    for part in ("encoding", "0.1/1.0 GB", "5.0 MB/s", "memory", "0:02:55"):
        assert part in lines[1]


def test_durations() -> None:
    assert [format_duration(n) for n in (0, 59.6, 3725, 90_000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:05",
        "1 day, 1:00:00",
    ]
