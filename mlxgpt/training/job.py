"""What is to be trained: the request, and the job that `setup_job` makes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.storage.run import Run
from mlxgpt.training.estimate import Estimate
from mlxgpt.training.finetune import InitWeights


@dataclass(frozen=True)
class TrainRequest:
    """A request to train, as the user made it.

    Attributes:
        config: what to train; the vocabulary size and dtype are still to be filled in.
        config_name: for the run's name, which is CONFIG-DATA unless `run_name` is given.
        run_name: a name in `runs_dir`, or a folder's path.
        max_minutes: plan as many steps as fit into this time; timed at the start of a new run.
        auto_size: choose the model's shape and the batch for that time, too.
        memory_limit: gigabytes; training that takes more is refused, or stopped and saved.
        fallback_source: a corpus to train on if the config's could not be downloaded.
        strict_vocab: refuse data of another vocabulary than `vocab_size`; otherwise the model has
            room for what the config says, or for the data's if that is more.
        init_weights: to start from, of the config's shape; None: the seed's.
    """

    config: Config
    config_name: str
    runs_dir: Path
    data_dir: Path
    run_name: str | None = None
    max_minutes: float | None = None
    auto_size: bool = False
    memory_limit: float | None = None
    fallback_source: str | None = None
    strict_vocab: bool = False
    init_weights: InitWeights | None = None

    def run_folder(self, dataset: Dataset) -> Path:
        """The run's folder."""
        name = self.run_name or f"{self.config_name}-{dataset.name}"
        return Path(name) if os.sep in name else self.runs_dir / name


@dataclass(frozen=True)
class TrainJob:
    """A run to train, to its end: everything that is decided before the first step.

    Attributes:
        config, dataset: fit each other, and the machine.
        folder: the run's.
        run: the one to resume, of the same config and data; None: a new one, or not the main rank.
        init_weights: of a new run; None: the seed's.
        estimate: what a step takes.
        memory_limit_bytes: training that takes more is stopped.
        finished_step: the last step of a run that is finished already.
        warning: what differs from what was asked for.
        is_retry: whether an attempt before this one failed on the GPU.
        start_time: when training started, on the monotonic clock.
        resumed: whether there was something to resume.
    """

    config: Config
    dataset: Dataset
    folder: Path
    run: Run | None
    estimate: Estimate
    init_weights: InitWeights | None = None
    memory_limit_bytes: int | None = None
    finished_step: int | None = None
    warning: str | None = None
    is_retry: bool = False
    start_time: float = field(default_factory=time.monotonic)
    resumed: bool = False

    def make_run(self) -> Run:
        """The run that is to be created."""
        origin: Mapping[str, Any] = self.init_weights.origin if self.init_weights else {}
        return Run(
            self.folder,
            self.config,
            self.dataset.tokenizer,
            self.dataset.name,
            self.dataset.meta.fingerprint,
            add_bos_token=self.dataset.tokenizer.end_of_text is not None,
            origin=origin,
        )
