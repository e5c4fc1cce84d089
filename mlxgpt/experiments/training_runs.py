"""Training runs of comparisons and scaling studies. They share them, so none is trained twice."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxgpt.config import Config, override_config, weight_affecting_fields
from mlxgpt.data.dataset import Dataset
from mlxgpt.distributed.group import LOCAL_GROUP
from mlxgpt.experiments.curves import build_learning_curve
from mlxgpt.experiments.planning import EstimateCache
from mlxgpt.experiments.registry import RUNS_FOLDER, Registry, training_key
from mlxgpt.experiments.results import RunResult
from mlxgpt.experiments.variants import Variant
from mlxgpt.storage.run import Run, open_run
from mlxgpt.training.callbacks import Callback, CallbackList
from mlxgpt.training.job import TrainJob
from mlxgpt.training.loop import DivergedError, run_training_loop
from mlxgpt.training.resume import find_resumable_run, is_finished
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


class StudyCallback(Callback):
    """Receives the events of the runs of a comparison or scaling study."""

    def on_variant_begin(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        """A run of a variant starts or resumes; `done` of about `total` runs are finished."""


class TrainingRuns:
    """The runs in `runs/compare/trainings`; trains those that are missing.

    Args:
        folder: `runs/compare`.
        registry: remembers runs that diverged.
        estimates: of the variants, by name.
        callbacks: receive the events of each run.
    """

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        estimates: EstimateCache,
        callbacks: Sequence[StudyCallback],
    ) -> None:
        self._folder, self._registry, self._estimates = folder, registry, estimates
        self._callbacks = callbacks
        self._logged_reuse = False

    def train(self, variant: Variant, seed: int, done: int, total: int) -> RunResult | None:
        """Train a variant with one seed, or reuse its run; None if training was interrupted.

        Args:
            done, total: number of finished runs, and of all, for the callbacks.
        """
        config = override_config(variant.config, {"seed": seed})
        key = training_key(config, variant.dataset)
        if key in self._registry.diverged:
            return RunResult(seed, key, math.inf, None)
        folder = self._folder / RUNS_FOLDER / key
        with files.file_lock(folder, "training"):
            run = find_resumable_run(folder)
            if run:
                _check_same_training(run, config, variant.dataset)
            if run and is_finished(run, config):
                self._log_reuse()
            else:
                estimate = self._estimates.get(variant)
                for callback in self._callbacks:
                    callback.on_variant_begin(
                        variant.name, seed, config.train.max_steps, done, total
                    )
                job = TrainJob(
                    config, variant.dataset, folder, run, estimate, resumed=run is not None
                )
                try:
                    if not self._run_training(job):
                        return None
                except DivergedError:
                    self._registry.diverged.append(key)
                    self._registry.save()
                    return RunResult(seed, key, math.inf, None)
        learning_curve = build_learning_curve(open_run(folder))
        return RunResult(seed, key, learning_curve.final_bits_per_byte, learning_curve)

    def _log_reuse(self) -> None:
        """Log once that existing runs are reused."""
        if not self._logged_reuse:
            self._logged_reuse = True
            logger.info("reusing runs from runs/compare/%s", RUNS_FOLDER)

    def _run_training(self, job: TrainJob) -> bool:
        """Train; returns whether the run finished."""
        callbacks = CallbackList(self._callbacks)
        attempt = partial(run_training_loop, group=LOCAL_GROUP, callbacks=callbacks)
        summary = retry_on_gpu_failure(attempt, job, LOCAL_GROUP)
        gc.collect()
        mx.clear_cache()
        return not summary.interrupted


def _check_same_training(run: Run, config: Config, dataset: Dataset) -> None:
    same_data = run.data_fingerprint == dataset.meta.fingerprint
    if not same_data or weight_affecting_fields(run.config, config):
        raise UserError(
            f"{run.folder} does not contain the expected run",
            "move this folder away; the same command trains the run again.",
        )
