"""What TensorBoard and wandb themselves read of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxgpt.storage.run import open_run

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's


def test_tensorboard_reads_the_records(train: Any, no_check: None) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = train("a", report_to="tensorboard")
    read = EventAccumulator(str(summary.run / "tensorboard"))
    read.Reload()
    records = list(open_run(summary.run).metrics())
    for name in ("loss", "val_loss", "lr", "tokens_per_second"):
        found = {event.step: _value(event) for event in read.Tensors(name)}
        wanted = {r["step"]: r[name] for r in records if name in r}
        assert found == pytest.approx(wanted, rel=1e-6)


def _value(event: Any) -> float:
    from tensorboard.util.tensor_util import make_ndarray

    return float(make_ndarray(event.tensor_proto))


def test_wandb_takes_the_records_offline(
    train: Any, no_check: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(home)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged: list[tuple[int, float]] = []
    log = wandb.Run.log

    def watched(run: Any, numbers: dict[str, float], *, step: int) -> None:
        assert run.name == "a"
        assert run.config["train"]["max_steps"] == 12
        logged.append((step, numbers["loss"]))
        log(run, numbers, step=step)

    monkeypatch.setattr(wandb.Run, "log", watched)
    summary = train("a", report_to="wandb")
    assert logged == [(r["step"], r["loss"]) for r in open_run(summary.run).metrics()]
    (file,) = home.glob("wandb/offline-run-*/run-*.wandb")
    assert b"val_loss" in file.read_bytes()
