"""Load the model of a run from a checkpoint, and open the dataset that it was trained on."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx

from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.data.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.model.gpt import GPT
from mlxgpt.model.lora import fuse_adapters
from mlxgpt.model.parameters import (
    add_vocab_rows,
    fit_positions,
    flatten_params,
    load_parameters,
)
from mlxgpt.model.stats import count_parameters
from mlxgpt.storage import checkpoint
from mlxgpt.storage import run as runs
from mlxgpt.storage.checkpoint import Checkpoint
from mlxgpt.storage.logs import RUN_FILE
from mlxgpt.storage.run import Run
from mlxgpt.utils import files
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
    parameters = ckpt.parameters
    if path.parent == run.snapshots:  # snapshots are 16-bit
        parameters = {name: value.astype(mx.float32) for name, value in parameters.items()}
    if run.config.lora.lora_rank:
        return _load_adapted_model(run, parameters), ckpt
    n_stored = sum(value.size for value in ckpt.parameters.values())
    n_expected = count_parameters(run.config.model)
    if n_stored != n_expected:  # before memory for the model is allocated
        raise UserError(
            f"config.toml describes {n_expected:,} parameters, but the checkpoint has {n_stored:,}",
            "restore the config.toml that belongs to the run's checkpoints.",
        )
    model = GPT(run.config.model)
    load_parameters(model, parameters)
    return model, ckpt


def _load_adapted_model(run: Run, adapters: dict[str, mx.array]) -> GPT:
    """The model of a run that contains only adapters, fused with its base.

    Raises:
        UserError: if the base is missing or another one, or the adapters do not fit it.
    """
    base, base_model, _ = load_base_model(run)
    parameters = fit_positions(flatten_params(base_model.parameters()), run.config.model.block_size)
    new_tokens = range(base.tokenizer.vocab_size, run.tokenizer.vocab_size)
    model = GPT(run.config.model)
    load_parameters(model, add_vocab_rows(parameters, new_tokens) if new_tokens else parameters)
    if not fuse_adapters(model, run.config.lora, adapters, new_tokens):
        logger.warning(f"the adapter of {run.name} changes nothing")
    return model


def load_base_model(run: Run) -> tuple[Run, GPT, int]:
    """Load the model that a run's adapters belong to: (its run, model, step of the checkpoint).

    Raises:
        UserError: see `open_base_run`.
    """
    base = open_base_run(run)
    model, ckpt = load_model(base, str(run.origin["step"]), fall_back=False)
    return base, model, ckpt.step


def open_base_run(run: Run) -> Run:
    """Open the run whose model a run's adapters belong to.

    Raises:
        UserError: if the run has no adapter, or its base is missing or another model.
    """
    if not run.config.lora.lora_rank:
        raise UserError(
            f"{run.name} has no adapter", "use a run that was trained with --lora-rank."
        )
    base, names = _open_origin(run), {run.name}
    ancestor = base
    while ancestor.config.lora.lora_rank:  # an adapter of an adapted model
        if ancestor.name in names:
            raise UserError(f"{run.name} is its own base", "restore its run.json.")
        names.add(ancestor.name)
        ancestor = _open_origin(ancestor)
    if not has_origin_weights(run, base):
        path = checkpoint.checkpoint_folder(base.checkpoints, run.origin["step"])
        raise UserError(
            f"{path} is not the model that the adapter of {run.name} was trained with",
            f"restore the original checkpoint of {base.name}.",
        )
    return base


def has_origin_weights(run: Run, origin_run: Run) -> bool:
    """Whether a run still has the weights that another run was initialized from."""
    path = checkpoint.checkpoint_folder(origin_run.checkpoints, run.origin["step"])
    file = path / checkpoint.MODEL_FILE
    return files.exists(file) and files.sha256_file(file) == run.origin["sha256"]


def _open_origin(run: Run) -> Run:
    """The run that another run's weights were initialized from; it must be in the same folder."""
    if origin_run := find_origin_run(run):
        return origin_run
    raise UserError(
        f"{run.name} contains only an adapter; the model it belongs to, "
        f"{str(run.origin.get('run'))!r}, is not in {run.folder.parent}",
        "copy that run there, too.",
    )


def find_origin_run(run: Run) -> Run | None:
    """The run that another run's weights were initialized from; None if it is not in the same
    folder.
    """
    name, origin = str(run.origin.get("run")), run.origin
    folder = run.folder.parent / name
    is_valid = type(origin.get("step")) is int and name == folder.name and "sha256" in origin
    return runs.open_run(folder) if is_valid and files.exists(folder / RUN_FILE) else None


def load_run_model(
    run: str | None,
    checkpoint: str,
    runs_dir: PathLike | None,
    *,
    fall_back: bool = True,
    adapter: bool = True,
) -> tuple[Run, GPT, int]:
    """Open a run and load its model: (run, model, step of the checkpoint); see `load_model`.

    Args:
        adapter: False loads the model that the run's adapter belongs to, without the adapter.
    """
    opened_run = runs.find_run(run, resolve_folder("runs", runs_dir))
    if not adapter:
        if checkpoint != "best":
            raise UserError(
                f"--no-adapter uses the base's checkpoint, not {checkpoint}", "omit --checkpoint."
            )
        base, model, step = load_base_model(opened_run)
        logger.info("%s, step %s, without the adapter", base.folder, f"{step:,}")
        return base, model, step
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
