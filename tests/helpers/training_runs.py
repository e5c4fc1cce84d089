"""Record a training run, and read its results."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import api
from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.estimate import Estimate
from tests.helpers.example_rows import write_rows
from tests.helpers.log_lines import capture_log_lines

# The modern recipe's, in Qwen3's layout without biases.
QWEN3_PARTS: dict[str, Any] = {
    "position": "rope",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "tied": False,
    "embedding_norm": True,
}
# Every option that some modern recipe uses.
MODERN_PARTS: dict[str, Any] = {
    **QWEN3_PARTS,
    "value_embeddings": True,
    "value_gate": True,
    "smear": True,
    "token_shift": True,
}
MODERN_STEPS: dict[str, Any] = {
    "optimizer": "muon",
    "embedding_learning_rate": 0.02,
    "schedule": "wsd",
}


class Recorder(Callback):
    """Records a training run's events and, inside `recording_logs`, its log lines.

    Args:
        echo: also print log lines on stderr.
    """

    def __init__(self, echo: bool = False) -> None:
        self.echo = echo
        self.log_lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.samples: list[tuple[int, str]] = []
        self.max_steps = 0
        self.estimate: Estimate | None = None

    @contextmanager
    def recording_logs(self) -> Iterator[Recorder]:
        """Record log lines within this context."""
        with capture_log_lines(self._record_line):
            yield self

    def _record_line(self, line: str) -> None:
        self.log_lines.append(line)
        if self.echo:
            print(f"note: {line}", file=sys.stderr)

    def on_train_begin(
        self, run: runs.Run, dataset: Dataset, start: int, estimate: Estimate
    ) -> None:
        self.max_steps = run.config.train.max_steps
        self.estimate = estimate

    def on_log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def on_sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))


def final_state(run: str) -> dict[str, np.ndarray]:
    """Return model and optimizer arrays of a run's newest checkpoint."""
    folder = Path("runs") / run / "checkpoints"
    saved = checkpoint.load_checkpoint(
        checkpoint.checkpoint_folder(folder, checkpoint.list_steps(folder)[-1]), with_optimizer=True
    )
    assert saved.optimizer is not None
    return {name: np.array(value) for name, value in (saved.parameters | saved.optimizer).items()}


def metrics(run: str) -> list[dict[str, Any]]:
    """Return the logged metrics that do not depend on time or machine."""
    keys = ("step", "loss", "lr", "grad_norm", "val_loss")
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key in keys} for line in lines
    ]


def last_saved_step(run: str) -> int:
    steps = checkpoint.list_steps(Path("runs") / run / "checkpoints")
    return steps[-1] if steps else 0


def train_fox_model(folder: Path, config: Config, *, stories: int = 40) -> runs.Run:
    """Train a small model with a byte-level BPE: the run `fox` in FOLDER/runs, with its data."""
    texts = [f"Once upon a time there were {n} foxes." for n in range(stories)]
    (folder / "fox.txt").write_text(END_OF_TEXT.join(texts))
    summary = api.train(
        config=config,
        source=folder / "fox.txt",
        tokenizer="bpe",
        vocab_size=280,
        run="fox",
        runs_dir=folder / "runs",
        data_dir=folder / "data",
    )
    return runs.open_run(summary.run)


def copy_fox_run(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    """Copy a folder with the run `fox` and its data, and make it the current one."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return runs.open_run(Path("runs/fox"))


def tune_on_pairs(folder: Path, config: Config) -> runs.Run:
    """Train the run `fox` in FOLDER/runs, and tune it on preference pairs: the run `tuned`."""
    train_fox_model(folder, config, stories=80)
    pairs = [
        {"prompt": f"There were {n}", "chosen": " foxes.", "rejected": " dogs!"} for n in range(20)
    ]
    write_rows(folder / "pairs.jsonl", *pairs)
    summary = api.train(
        init_from="fox",
        source=folder / "pairs.jsonl",
        run="tuned",
        runs_dir=folder / "runs",
        data_dir=folder / "data",
        max_steps=10,
        learning_rate=1e-2,
        eval_interval=5,
        batch_size=2,
    )
    return runs.open_run(summary.run)
