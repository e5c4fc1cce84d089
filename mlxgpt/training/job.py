"""The user's request to train, and the job that `setup_job` makes from it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import ExampleArray
from mlxgpt.evaluation.loss import EvalDataset
from mlxgpt.storage.run import Run
from mlxgpt.training.estimate import Estimate
from mlxgpt.training.finetune import InitWeights


@dataclass(frozen=True)
class TrainRequest:
    """The user's request to train.

    Attributes:
        config: config to train; vocabulary size and dtype may still be unresolved.
        config_name: first part of the default run name, CONFIG-DATA.
        run_name: name in `runs_dir` or path of a folder; None for the default name.
        max_minutes: plan as many steps as fit into this time, measured when a new run starts.
        auto_size: also choose model size and batch size for that time.
        memory_limit: gigabytes; training that needs more is refused, or saved and stopped.
        fallback_source: dataset to train on if the config's could not be downloaded.
        strict_vocab: reject data with a larger vocabulary than `vocab_size`; otherwise the model
            gets the larger of the two.
        init_weights: weights to initialize from, of the config's shape; None for random ones.
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
        """Path of the run's folder."""
        name = self.run_name or f"{self.config_name}-{dataset.name}"
        return Path(name) if os.sep in name else self.runs_dir / name


@dataclass(frozen=True)
class TrainJob:
    """A run to train: everything that is decided before the first step.

    Attributes:
        config, dataset: resolved, and checked to fit each other and the machine.
        folder: the run's folder.
        run: run to resume, with the same config and data; None if new or on a non-main rank.
        estimate: estimated time and memory of training.
        init_weights: initial weights of a new run; None for random ones.
        base_val: validation data of the run that they are from, to show what is forgotten; None
            if it is not here, or is the same as this run's.
        memory_limit_bytes: training that uses more is stopped.
        finished_step: last step of a run that is already finished.
        warning: how the run differs from the request, if it does.
        is_retry: whether a previous attempt failed on the GPU.
        start_time: when training started (`time.monotonic`).
        resumed: whether an existing run is resumed.
    """

    config: Config
    dataset: Dataset
    folder: Path
    run: Run | None
    estimate: Estimate
    init_weights: InitWeights | None = None
    base_val: EvalDataset | None = None
    memory_limit_bytes: int | None = None
    finished_step: int | None = None
    warning: str | None = None
    is_retry: bool = False
    start_time: float = field(default_factory=time.monotonic)
    resumed: bool = False

    def make_run(self) -> Run:
        """The new run, not created on disk yet."""
        train = self.dataset.train
        weights, end_of_text = self.init_weights, self.dataset.tokenizer.end_of_text
        return Run(
            self.folder,
            self.config,
            self.dataset.tokenizer,
            self.dataset.name,
            self.dataset.meta.fingerprint,
            add_bos_token=weights.adds_bos if weights else end_of_text is not None,
            origin=weights.origin if weights else {},
            tokens_per_row=train.tokens_per_row if isinstance(train, ExampleArray) else None,
        )
