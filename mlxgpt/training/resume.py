"""Resume a run: find it, check that it matches the request, and restore its newest checkpoint."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxgpt.backend.environment import describe_environment, environment_changes
from mlxgpt.config import Config, diff_configs, override_config, weight_affecting_fields
from mlxgpt.data.dataset import Dataset
from mlxgpt.distributed.group import ProcessGroup
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.checkpoint import Checkpoint
from mlxgpt.storage.hold_folder import hold_run_folder
from mlxgpt.storage.run import Run
from mlxgpt.training.auto_size import AUTO_SIZED_FIELDS
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.finetune import InitWeights
from mlxgpt.training.job import TrainJob
from mlxgpt.training.patience import is_out_of_patience
from mlxgpt.training.spike_guard import SpikeGuard
from mlxgpt.training.step import TrainStep
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartState:
    """State at the start of training, the same on every rank.

    Attributes:
        step: steps taken so far.
        guard: spike guard after that step.
        unlogged_metrics: metrics of that step, if the run was killed after saving it and before
            evaluating and logging it.
        bos: id of the token that starts each document; None if documents start without one.
    """

    step: int
    guard: SpikeGuard
    unlogged_metrics: dict[str, float] | None
    bos: int | None


@contextmanager
def resume_or_create_run(
    job: TrainJob, group: ProcessGroup, step_function: TrainStep, callbacks: Callback
) -> Iterator[tuple[Run | None, StartState]]:
    """Context that restores a job's run from its newest checkpoint, or creates it, and gives every
    rank the same weights. Yields the run (None on non-main ranks) and the start state.

    Raises:
        UserError: if no checkpoint is intact, or the run cannot be written.
    """
    if not group.is_main:
        yield None, _make_start_state(broadcast_state(group, step_function, None), job.config)
        return
    config, saved_checkpoint = job.config, None
    # Before a retry, the failed attempt may have saved a checkpoint.
    run = find_resumable_run(job.folder) if job.is_retry else job.run
    changed_settings: Mapping[str, tuple[Any, Any]] = {}
    if run:
        saved_checkpoint = load_newest_checkpoint(run, run.steps(), step_function)
        logger.info(f"resuming {run.name} from step {saved_checkpoint.step:,}")
        changed_settings = diff_configs(run.config, config)
        _log_changes(run, changed_settings, group.size)
        run = replace(run, config=config)
    else:
        run = job.make_run()
    if not job.is_retry:
        callbacks.on_run(run)
    if saved_checkpoint:
        run.write_config(config)
    else:
        runs.create_run(run, job.init_weights.chat_template if job.init_weights else None)
    step = saved_checkpoint.step if saved_checkpoint else 0
    estimate = job.estimate.for_plan(config, step)
    with hold_run_folder(run) as run:
        run.log_session_start(
            step, describe_environment(group.size), changed_settings, estimate.to_tree()
        )
        is_logged = run.truncate_after(step)
        callbacks.on_train_begin(run, job.dataset, step, estimate)
        metrics = saved_checkpoint.metrics if saved_checkpoint and not is_logged else {}
        state = {
            "step": step,
            "guard": saved_checkpoint.guard if saved_checkpoint else {},
            "unlogged": metrics if metrics.keys() == {"lr", "loss", "grad_norm"} else None,
            "bos": run.bos,
        }
        yield run, _make_start_state(broadcast_state(group, step_function, state), config)


def _make_start_state(state: Mapping[str, Any], config: Config) -> StartState:
    guard = SpikeGuard.from_tree(state["guard"], config.train.on_spike)
    if guard.has_diverged:  # resuming gives it another chance
        guard.consecutive_skips = guard.rollbacks = 0
    return StartState(state["step"], guard, state["unlogged"], state["bos"])


def load_newest_checkpoint(run: Run, steps: list[int], step_function: TrainStep) -> Checkpoint:
    """Restore the newest undamaged checkpoint among those of `steps`, and return it."""
    paths = [checkpoint.checkpoint_folder(run.checkpoints, step) for step in reversed(steps)]
    saved_checkpoint = run.load_first_valid(paths, with_optimizer=True)
    assert saved_checkpoint.optimizer is not None
    step_function.restore(saved_checkpoint.parameters, saved_checkpoint.optimizer)
    return saved_checkpoint


def broadcast_state(
    group: ProcessGroup, step_function: TrainStep, state: dict[str, Any] | None
) -> dict[str, Any]:
    """Collective. Broadcast the main rank's weights, optimizer state and `state` to all ranks."""
    state = group.broadcast("state", state)
    if group.size > 1:
        parameters, optimizer = step_function.state_dicts()
        step_function.restore(
            group.broadcast_arrays("parameters", parameters),
            group.broadcast_arrays("optimizer", optimizer),
        )
    return state


def find_resumable_run(folder: Path) -> Run | None:
    """The run in a folder, or None if a run can be created there. A run without checkpoints has
    nothing to lose and is started over.
    """
    if files.exists(folder / "run.json"):
        run = runs.open_run(folder)
        run.best()  # raises if it is damaged or in a newer format, before anything is changed
        for parent in (run.checkpoints, run.snapshots):
            # Keeps all checkpoints, but deletes temporary files of a killed process.
            checkpoint.prune_checkpoints(parent, {*checkpoint.list_steps(parent)})
        return run if run.steps() else None
    if files.exists(folder) and any(folder.iterdir()):
        raise UserError(f"{folder} exists but is not a run", "choose another name with --run NAME.")
    return None


def is_finished(run: Run, config: Config) -> bool:
    """Whether a run has taken all its steps and logged the last one, or is out of patience."""
    last = run.steps()[-1]
    if last > config.train.max_steps:
        return True
    is_last = last == config.train.max_steps or is_out_of_patience(run, config)
    return is_last and run.has_metrics(last)


def check_resumable(
    run: Run, config: Config, dataset: Dataset, init_weights: InitWeights | None
) -> None:
    """Check that a run has the same data, initial weights and settings as the request.

    Raises:
        UserError: with the differences.
    """
    if not run.data_name:
        raise UserError(
            f"{run.name} is an imported model",
            f"start a new run from it: mlxgpt train --init-from {run.name}.",
        )
    if dict(run.origin) != dict(init_weights.origin if init_weights else {}):
        raise UserError(
            f"{run.name} exists and was initialized from different weights",
            "start a new run with --run NAME, or use the same --init-from.",
        )
    if run.data_fingerprint != dataset.meta.fingerprint:
        if run.data_name == dataset.name:
            raise UserError(
                f"{dataset.folder} has changed since {run.name} was trained on it",
                "start a new run with --run NAME, or prepare the original dataset again.",
            )
        raise UserError(
            f"{run.name} was trained on {run.data_name}, not on {dataset.name}",
            "start a new run with --run NAME, or use the same --source.",
        )
    if names := weight_affecting_fields(run.config, config):
        changed_settings = diff_configs(run.config, config)
        description = ", ".join(
            f"{name} {_format_change(*changed_settings[name])}" for name in names
        )
        remedy = "start a new run with --run NAME, or use the same settings to resume."
        if names == ["max_steps"] and is_finished(run, run.config):
            description += "; the run is finished, and its learning rate schedule has ended"
            remedy = (
                "continue in a new run with a new schedule: "
                f"mlxgpt train --init-from {run.name} --max-steps N; or start over with --run NAME."
            )
        raise UserError(f"{run.name} exists with different settings: {description}", remedy)


def apply_run_plan(config: Config, run: Run, fit_size: bool) -> Config:
    """Set the steps, and if `fit_size` the model size, that were chosen when the run started."""
    planned_fields = ("max_steps", "warmup_steps", *(AUTO_SIZED_FIELDS if fit_size else ()))
    changed_settings = diff_configs(config, run.config)
    return override_config(
        config,
        {name: changed_settings[name][1] for name in planned_fields if name in changed_settings},
    )


RECENT_RECORDS = 20  # records of metrics.jsonl
MAX_STEP_SECONDS = 86_400.0  # more is not plausible


def median_step_seconds(run: Run) -> float | None:
    """Median seconds per step in a run's latest metrics; None if that is not plausible."""
    recorded_rates = deque(
        (record.get("tokens_per_second") for record in run.metrics()), maxlen=RECENT_RECORDS
    )
    rates = [float(r) for r in recorded_rates if isinstance(r, int | float) and 0 < r < 1e12]
    seconds = run.tokens_per_step / statistics.median(rates) if rates else math.inf
    return seconds if seconds < MAX_STEP_SECONDS else None


def find_environment_changes(run: Run, ranks: int) -> list[str]:
    """Changes of device, versions and libraries since the run was last trained."""
    # Old runs did not record their ranks, and had one.
    old_environment = {"ranks": "1", **run.last_environment()}
    return environment_changes(old_environment, describe_environment(ranks))


# Config fields that only affect rounding.
ROUNDING_FIELDS = {"batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}


def _log_changes(run: Run, changed_settings: Mapping[str, tuple[Any, Any]], ranks: int) -> None:
    """Log what changed since the run was last trained, and whether it affects rounding."""
    changed_environment = find_environment_changes(run, ranks)
    if changed_settings or changed_environment:
        is_exact = not changed_environment and not changed_settings.keys() & ROUNDING_FIELDS
        descriptions = [
            f"{name} {_format_change(*pair)}" for name, pair in changed_settings.items()
        ]
        logger.info(
            f"changed since {run.name} was last trained: "
            + ", ".join([*descriptions, *changed_environment])
            + ("" if is_exact else "; results may differ from an uninterrupted run by rounding")
        )


def _format_change(old: Any, new: Any) -> str:
    return f"{old} → {new}"
