"""Load the model of a run from a checkpoint, and open the dataset that it was trained on."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx

from mlxgpt.config.resolve import PathLike, resolve_folder
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


def load_model(
    run: Run, selector: str = "best", *, fall_back: bool = True
) -> tuple[GPT, Checkpoint]:
    """Load the model of a run from a checkpoint: `best`, `newest`, or a step. Logs damaged
    checkpoints that were skipped.

    Args:
        fall_back: if the best or newest checkpoint is damaged, use the newest undamaged one.

    Raises:
        UserError: if the checkpoint is missing or damaged, or has another tokenizer than the run.
    """
    path = run.checkpoint_path(selector)
    paths = [path]
    if fall_back and not selector.isdecimal():
        fallbacks = (
            checkpoint.checkpoint_folder(run.checkpoints, n) for n in reversed(run.steps())
        )
        paths += [fallback for fallback in fallbacks if fallback != path]
    ckpt = run.load_first_valid(paths)
    n_stored = sum(value.size for value in ckpt.parameters.values())
    n_expected = count_parameters(run.config.model)
    if n_stored != n_expected:  # before memory for the model is allocated
        raise UserError(
            f"config.toml describes {n_expected:,} parameters, but the checkpoint has {n_stored:,}",
            "restore the config.toml that belongs to the run's checkpoints.",
        )
    model = GPT(run.config.model)
    parameters = ckpt.parameters
    if path.parent == run.snapshots:  # snapshots are 16-bit
        parameters = {name: value.astype(mx.float32) for name, value in parameters.items()}
    load_parameters(model, parameters)
    return model, ckpt


def load_run_model(
    run: str | None,
    checkpoint: str,
    runs_dir: PathLike | None,
    *,
    fall_back: bool = True,
) -> tuple[Run, GPT, int]:
    """Open a run and load its model: (run, model, step of the checkpoint); see `load_model`."""
    opened_run = runs.find_run(run, resolve_folder("runs", runs_dir))
    model, ckpt = load_model(opened_run, checkpoint, fall_back=fall_back)
    logger.info("%s, step %s", opened_run.folder, f"{ckpt.step:,}")
    return opened_run, model, ckpt.step


def open_run_dataset(run: Run, data_dir: Path) -> Dataset:
    """Open the dataset that a run was trained on."""
    if not run.data_name:
        raise UserError(
            f"{run.name} is an imported model without validation data",
            "choose a file to evaluate on: --source FILE.",
        )
    folder = data_dir / run.data_name
    if not is_prepared(folder):
        raise UserError(
            f"the dataset of {run.name} is not in {folder}",
            "set its parent folder with --data-dir, or evaluate on a file: --source FILE.",
        )
    dataset = open_dataset(folder)
    if dataset.meta.fingerprint != run.data_fingerprint:
        raise UserError(
            f"{folder} is not the dataset that {run.name} was trained on",
            "choose a file to evaluate on: --source FILE.",
        )
    return dataset
