"""Stop training when the validation loss no longer improves."""

from __future__ import annotations

import math

from mlxgpt.config import Config
from mlxgpt.storage.run import Run


def is_out_of_patience(run: Run, config: Config) -> bool:
    """Whether the last `patience` evaluations of a run were not better than one before them."""
    if not config.train.patience:
        return False
    losses = [record["val_loss"] for record in run.metrics() if "val_loss" in record]
    losses = [math.inf if loss is None else loss for loss in losses]
    best = losses.index(min(losses)) if losses else 0
    return len(losses) - 1 - best >= config.train.patience
