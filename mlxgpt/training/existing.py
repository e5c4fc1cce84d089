"""The run that is there already: whether a request goes on with it, and what has changed since."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.backend.environment import describe_environment, environment_changes
from mlxgpt.config import Config, changed_weights, differences, override
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.errors import UserError
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.training.beginning import Beginning
from mlxgpt.training.callback import Callback
from mlxgpt.training.sizing import SIZED

ROUNDING = {"batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
LATEST = 20  # lines of metrics that tell how long a step takes
LONGEST_SECONDS = 86_400.0  # of a step; who reads of a longer one believes nothing


def existing(folder: Path) -> Run | None:
    """The run in a folder, or None where one may be made. A run without any checkpoint has
    nothing to lose, and is begun again.
    """
    if files.exists(folder / "run.json"):
        run = runs.open_run(folder)
        for saved in (run.checkpoints, run.snapshots):
            checkpoint.prune(saved, {*checkpoint.steps(saved)})  # scratch files of a killed process
        return run if run.steps() else None
    if files.exists(folder) and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no run", "choose another name with --run NAME.")
    return None


def is_finished(run: Run, config: Config) -> bool:
    """Whether a run has taken all its steps, and noted how they ended."""
    last = run.steps()[-1]
    return last > config.train.max_steps or (last == config.train.max_steps and run.noted(last))


def must_match(run: Run, config: Config, dataset: Dataset, beginning: Beginning | None) -> None:
    if not run.data_name:
        raise UserError(
            f"{run.name} is an imported model",
            f"train a new run from it: mlxgpt train --from {run.name}.",
        )
    if dict(run.origin) != dict(beginning.origin if beginning else {}):
        raise UserError(
            f"{run.name} exists, and was begun with other weights",
            "train a new run with --run NAME, or give the same --from.",
        )
    if run.data_fingerprint != dataset.meta.fingerprint:
        if run.data_name == dataset.name:
            raise UserError(
                f"{dataset.folder} was prepared anew since {run.name} was trained on it",
                "train a new run with --run NAME, or prepare the former text again.",
            )
        raise UserError(
            f"{run.name} was trained on other data ({run.data_name}) than {dataset.name}",
            "train a new run with --run NAME, or give the same --source.",
        )
    if names := changed_weights(run.config, config):
        changed = differences(run.config, config)
        told = ", ".join(f"{name} {_arrow(*changed[name])}" for name in names)
        remedy = "train a new run with --run NAME, or use the same settings to resume."
        if names == ["max_steps"] and is_finished(run, run.config):
            told += ", and is finished: its learning rate fell for as many steps as it has"
            remedy = (
                "train on in a new run, with a schedule of its own: "
                f"mlxgpt train --from {run.name} --max-steps N; or anew: --run NAME."
            )
        raise UserError(f"{run.name} exists with other settings: {told}", remedy)


def as_planned(config: Config, run: Run, fit_size: bool) -> Config:
    """`config` with what `planned`, and `sized`, decided when the run was begun."""
    decided = ("max_steps", "warmup_steps", *(SIZED if fit_size else ()))
    changed = differences(config, run.config)
    return override(config, {name: changed[name][1] for name in decided if name in changed})


def step_seconds(run: Run) -> float | None:
    """Of its latest steps, by what it noted; None where it noted nothing that can be."""
    noted = deque((record.get("tokens_per_second") for record in run.metrics()), maxlen=LATEST)
    rates = [float(r) for r in noted if isinstance(r, int | float) and 0 < r < 1e12]
    seconds = run.config.tokens_per_step / statistics.median(rates) if rates else math.inf
    return seconds if seconds < LONGEST_SECONDS else None


def tell_of_changes(
    run: Run, changed: Mapping[str, tuple[Any, Any]], callback: Callback, ranks: int = 1
) -> None:
    """What is not as it was when the run was last trained, and that its bits hang on it."""
    told = [f"{name} {_arrow(*pair)}" for name, pair in changed.items()]
    # Before there could be several ranks, none were noted.
    others = environment_changes({"ranks": "1", **run.surroundings()}, describe_environment(ranks))
    if told or others:
        exact = not others and not changed.keys() & ROUNDING
        callback.on_note(
            f"changed since: {', '.join([*told, *others])}"
            + ("" if exact else "; the rest will differ by rounding from an uninterrupted training")
        )


def _arrow(old: Any, new: Any) -> str:
    return f"{old} → {new}"
