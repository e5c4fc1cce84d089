from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mlxgpt import api
from mlxgpt.cli import progress, training_display
from mlxgpt.cli.console import logging_to_console, stderr_console
from mlxgpt.cli.training_display import MAX_CURVE_RECORDS, LiveView, TrainingDisplay
from mlxgpt.data.dataset import open_dataset
from mlxgpt.storage import run as runs
from mlxgpt.training.callbacks import TrainingSummary
from mlxgpt.training.estimate import Estimate, ReferenceResult
from mlxgpt.training.selfcheck import CheckResult

RECORD = {
    "step": 1200,
    "loss": 1.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 8123.4,
    "peak_share": 0.34,
    "memory_bytes": 412_000_000,
}


def render_training(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    *,
    terminal: bool,
    width: int = 120,
) -> str:
    """Return everything that a display writes during a short training run."""
    console = Console(
        stderr=True, force_terminal=terminal, width=width, highlight=False, no_color=True
    )
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    display = TrainingDisplay()
    run = runs.open_run(trained / "runs" / "done")
    display.on_check(CheckResult("causality", True, "fine"))
    reference = ReferenceResult(1.5150, 2.186, 10_240_000, "a-report.md")
    estimate = Estimate(0.2, 1e-3, 310_000_000, 10_000, 5000, 10, 120_000, reference)
    display.on_train_begin(run, open_dataset(trained / "data" / "words"), 0, estimate)
    display.on_log(RECORD)
    display.on_log({**RECORD, "step": 1210, "val_loss": 1.75})
    display.on_sample(1210, "[bold]To be[/bold]\n:smile: or")
    display.on_log({**RECORD, "step": 1220})
    summary = TrainingSummary(
        run=run.folder,
        data=trained / "data" / "words",
        step=1220,
        steps=5000,
        loss=1.5,
        loss_unit="nats per token",
        val_loss=1.75,
        best_step=1210,
        seconds=3725.0,
        interrupted=True,
        resumed=False,
        try_it="mlxgpt generate --run " + "x" * 100,
        warning="nothing is as it was asked for",
    )
    display.on_train_end(summary)
    display.close()
    return capsys.readouterr().err


def test_without_a_terminal_plain_lines_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    text = render_training(monkeypatch, capsys, trained, terminal=False)
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if line.startswith("step 1,210"))
    for part in ("loss 1.5000", "val loss 1.7500", "lr 1.00e-03", "tok/s 8,123"):
        assert part in line
    for part in ("% of peak 34%", "memory 412.0 MB", "ETA"):
        assert part in line
    assert "source      words.txt\n" in text
    assert "step 1,200" not in text, "not a line for every record"
    assert "sample at step 1,210:\n[bold]To be[/bold]\n:smile: or\n" in text, (
        "no markup, no padding"
    )
    assert "about 0:18:40 and 310.0 MB of memory, from measured steps: 200 ms per step" in text
    assert "val loss 1.5150, 2.186 bits per byte" in text
    assert "1,220 of 5,000 steps in 1:02:05" in text
    assert "mlxgpt generate --run " + "x" * 100 in text, "a command is not broken"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_live_view_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    width: int,
) -> None:
    text = render_training(monkeypatch, capsys, trained, terminal=True, width=width)
    assert "\x1b[" in text
    for part in ("val loss", "tok/s", "% of peak", "memory", "ETA", "8,123"):
        assert part in text
    assert "\x1b[?25h" in text, "the cursor comes back"


@pytest.mark.parametrize(("width", "rows"), [(110, 3), (60, 5)])
def test_live_view_has_a_bar_and_names_above_values(
    capsys: pytest.CaptureFixture[str], width: int, rows: int
) -> None:
    console = Console(width=width, no_color=True)
    console.print(LiveView(console, 0, 5000).render(RECORD))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == rows
    assert set(lines[0]) <= set("━╸╺ ")
    assert lines[1].split()[:2] == ["step", "loss"]
    assert lines[2].split()[:2] == ["1,200/5,000", "1.5000"]
    assert "8,123" in lines[-1]


def test_failed_self_check_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingDisplay().on_check(CheckResult("causality", False, "sees ahead"))
    assert "causality: sees ahead" in capsys.readouterr().err


def test_live_view_eta_and_last_validation_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(training_display, "time", SimpleNamespace(monotonic=lambda: now[0]))
    view = LiveView(stderr_console(), start_step=50, steps=100)
    now[0] = 20.0
    record = {"step": 60, "loss": 2.0, "lr": 1e-3, "tokens_per_second": 9.0, "peak_share": 0.1}
    record["memory_bytes"] = 1000
    view.show({**record, "val_loss": 2.5})
    view.show(record)
    numbers = dict(view._format_metrics(record))
    assert numbers["val loss"] == "2.5000"
    assert numbers["ETA"] == "0:01:20", "40 steps of two seconds"


def test_display_of_a_complete_run(
    home: Path, text_file: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to_console():
        api.train(config=tiny, source=text_file, run="r", callbacks=[TrainingDisplay()])
    text = capsys.readouterr().err
    for part in (
        "preparing",
        "11 checks passed",
        "parameters: 2 layers",
        "12 steps of 32 tokens",
        "sample at step 4",
        "step 12/12",
        "done",
        "(best, at step",
        "mlxgpt generate --run runs/r",
    ):
        assert part in text


def test_display_of_adapters(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.train(
        init_from="done",
        source="data/words",
        run="tuned",
        max_steps=1,
        lora_rank=2,
        lora_layers=1,
        callbacks=[TrainingDisplay()],
    )
    # 2 blocks of width 16: c_attn 16 -> 48, c_proj 16 -> 16, the MLP 16 -> 64 -> 16.
    trained = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    text = capsys.readouterr().err
    assert f"LoRA, rank 2, alpha 16, in 1 of 2 blocks: {trained:,} trained parameters, " in text


@pytest.mark.parametrize(("height", "curve"), [(40, True), (20, False)])
def test_tall_terminal_shows_the_loss_curve(height: int, curve: bool) -> None:
    console = Console(force_terminal=True, width=100, height=height, record=True, no_color=True)
    records = [{"step": n, "loss": 4.0 - n / 100} for n in range(10, 100, 10)]
    view = LiveView(console, 90, 5000, records)
    view.close()
    for step in (100, 110, 100):  # rolled back
        view.show({**RECORD, "step": step})
    console.print(view.render(RECORD))
    assert ("0 to 100 steps" in console.export_text()) is curve
    assert [record["step"] for record in view._records] == [*range(10, 100, 10), 100]


def test_curve_records_are_thinned_out() -> None:
    view = LiveView(Console(stderr=True), 0, 10**6)
    for step in range(1, 5001):
        view.show({**RECORD, "step": step, **({"val_loss": 2.0} if step % 1000 == 0 else {})})
    assert len(view._records) <= MAX_CURVE_RECORDS
    assert [r["step"] for r in view._records if "val_loss" in r] == [1000, 2000, 3000, 4000, 5000]
