from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.html_report.run_metrics import X_AXES, load_run_metrics
from mlxgpt.storage.run import Run, open_run


@pytest.fixture
def run(place: Path) -> Run:
    return open_run(place / "runs" / "done")


def write_records(run: Run, name: str, *lines: object) -> None:
    text = "".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines)
    (run.folder / name).write_text(text)


def test_metrics_become_arrays(run: Run) -> None:
    tokens_per_step = run.config.tokens_per_step
    write_records(
        run,
        "metrics.jsonl",
        {"step": 2, "loss": 3.0, "tokens_per_second": tokens_per_step, "skipped": 0},
        {"step": 4, "loss": None, "tokens_per_second": 0, "skipped": 0, "val_loss": 2.5},
        {"step": 6, "loss": 2.0, "tokens_per_second": 2 * tokens_per_step, "skipped": 1},
    )
    metrics = load_run_metrics(run)
    assert metrics.steps.tolist() == [2, 4, 6]
    assert metrics.tokens.tolist() == [
        2 * tokens_per_step,
        4 * tokens_per_step,
        6 * tokens_per_step,
    ]
    # Two steps at 1 step/s, two of unknown duration, two at 2 steps/s.
    np.testing.assert_allclose(60 * metrics.minutes, [2, 2, 3])
    np.testing.assert_array_equal(metrics.values["loss"], [3, np.nan, 2])
    assert metrics.last_value("val_loss") == 2.5
    assert metrics.last_value("lr") is None
    assert metrics.events == [(6, "1 skipped")]
    for axis in X_AXES:
        assert len(metrics.x_values(axis)) == 3
    assert metrics.x_at_step(3, "steps") == 3


def test_events_and_estimate(run: Run) -> None:
    start_event: dict[str, object] = {"on": {}, "changed": {}}
    estimate = {"seconds": 9.5, "val_loss": None, "peak_bytes": "many"}
    write_records(
        run,
        "history.jsonl",
        {"step": 0, **start_event, "forecast": estimate},
        {"step": 4, "spiked": 9},
        {"step": 8, **start_event, "forecast": {"seconds": 1.0}},
    )
    metrics = load_run_metrics(run)
    assert metrics.events == [(4, "rolled back from step 9"), (8, "resumed")]
    assert metrics.estimate == {"seconds": 9.5}, "numeric values of the first estimate"


def test_run_stores_its_estimate(run: Run) -> None:
    metrics = load_run_metrics(run)
    assert metrics.events == []
    assert set(metrics.estimate) == {"step_seconds", "seconds", "peak_bytes"}
    assert metrics.estimate["seconds"] > 12 * metrics.estimate["step_seconds"] > 0


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]\n",
        "\0\0\n",
        '{"step": "x"}\n',
        f'{{"step": {10**400}}}\n',
        '{"step": -1}\n',
        '{"step": 1e999}\n',
        '{"step": 3, "loss": "x"}\n',
        '{"step": 3, "loss": 1e400, "lr": true, "skipped": [1]}\n',
    ],
)
def test_damaged_metrics_are_skipped(run: Run, line: str) -> None:
    write_records(run, "metrics.jsonl", {"step": 2, "loss": 3.0}, line)
    metrics = load_run_metrics(run)
    assert metrics.steps[0] == 2
    assert metrics.last_value("loss") == 3.0
    assert load_run_metrics(run).values["lr"][-1] != metrics.values["lr"][-1], "NaN"


def test_run_without_metrics(run: Run) -> None:
    (run.folder / "metrics.jsonl").unlink()
    (run.folder / "history.jsonl").unlink()
    metrics = load_run_metrics(run)
    assert len(metrics.steps) == len(metrics.minutes) == 0
    assert metrics.x_at_step(3, "steps") == 0
    assert metrics.last_value("loss") is None
    assert metrics.estimate == {}
