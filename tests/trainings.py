"""A training that is watched, and what is left of it, for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.corpus.dataset import Dataset
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import Estimate

# All that the modern recipes have, in any of them.
MODERN_PARTS: dict[str, Any] = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "tied": False,
    "embedding_norm": True,
    "value_embeddings": True,
}
MODERN_STEPS: dict[str, Any] = {
    "optimizer": "muon",
    "embedding_learning_rate": 0.02,
    "schedule": "linear",
}


class Recorder(Callback):
    """Remembers what it is told; and says some of it, where nobody could ask."""

    def __init__(self, aloud: bool = False) -> None:
        self.aloud = aloud
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        self.plan = 0
        self.forecast: Estimate | None = None

    def on_train_begin(
        self, run: runs.Run, dataset: Dataset, start: int, forecast: Estimate
    ) -> None:
        self.plan = run.config.train.max_steps
        self.forecast = forecast

    def on_note(self, line: str) -> None:
        self.notes.append(line)
        if self.aloud:
            print(f"note: {line}", file=sys.stderr)

    on_warning = on_note

    def on_log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def on_sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))


def final_state(run: str) -> dict[str, np.ndarray]:
    """Model and optimizer of a run's newest checkpoint."""
    folder = Path("runs") / run / "checkpoints"
    saved = checkpoint.load(
        checkpoint.path_of(folder, checkpoint.steps(folder)[-1]), with_optimizer=True
    )
    assert saved.optimizer is not None
    return {name: np.array(value) for name, value in (saved.parameters | saved.optimizer).items()}


def metrics(run: str) -> list[dict[str, Any]]:
    """The metrics that do not hang on the clock or the machine."""
    kept = ("step", "loss", "lr", "grad_norm", "val_loss")
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def len_done(run: str) -> int:
    steps = checkpoint.steps(Path("runs") / run / "checkpoints")
    return steps[-1] if steps else 0
