"""Reads the model of a run's checkpoint, and opens the data that the run was trained with."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx

from mlxgpt.config.resolve import PathLike, home
from mlxgpt.data.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.checkpoint import Checkpoint
from mlxgpt.storage.run import Run
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


def load_model(run: Run, which: str = "best", *, fall_back: bool = True) -> tuple[GPT, Checkpoint]:
    """The model of a run's checkpoint: `best`, `newest`, or a step. Damaged checkpoints that were
    skipped are logged.

    Args:
        fall_back: where the best or the newest is damaged, use the newest that is whole.

    Raises:
        UserError: if there is none, it is damaged, or it was made with another tokenizer.
    """
    path = run.checkpoint_path(which)
    paths = [path]
    if fall_back and not which.isdecimal():
        others = (checkpoint.path_of(run.checkpoints, n) for n in reversed(run.steps()))
        paths += [other for other in others if other != path]
    saved = run.load_first(paths)
    there = sum(value.size for value in saved.parameters.values())
    if there != (wanted := count_parameters(run.config.model)):  # before a model of that size
        raise UserError(
            f"config.toml tells of {wanted:,} parameters, and the checkpoint has {there:,}",
            "restore the run's own files; config.toml and checkpoints belong together.",
        )
    model = GPT(run.config.model)
    parameters = saved.parameters
    if path.parent == run.snapshots:  # which is in 16 bits
        parameters = {name: value.astype(mx.float32) for name, value in parameters.items()}
    load_parameters(model, parameters)
    return model, saved


def opened(
    run: str | None,
    checkpoint: str,
    runs_dir: PathLike | None,
    *,
    fall_back: bool = True,
) -> tuple[Run, GPT, int]:
    """A run, the model of one of its checkpoints, and its step; see `load_model`."""
    found = runs.find(run, home("runs", runs_dir))
    model, saved = load_model(found, checkpoint, fall_back=fall_back)
    logger.info("%s, step %s", found.folder, f"{saved.step:,}")
    return found, model, saved.step


def data_of(run: Run, data_dir: Path) -> Dataset:
    """The data that a run was trained with."""
    if not run.data_name:
        raise UserError(
            f"{run.name} was imported, without a validation text",
            "give a text to evaluate on: --source FILE.",
        )
    folder = data_dir / run.data_name
    if not is_prepared(folder):
        raise UserError(
            f"the data of {run.name} is not in {folder}",
            "give a text to evaluate on: --source FILE; or name its folder: --data-dir.",
        )
    dataset = open_dataset(folder)
    if dataset.meta.fingerprint != run.data_fingerprint:
        raise UserError(
            f"{folder} holds other data than {run.name} was trained with",
            "give a text to evaluate on: --source FILE.",
        )
    return dataset
