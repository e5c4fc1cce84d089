"""From what was asked for to what is meant: folders, configs, runs with their models and data.

Folders default to `runs` and `data` under the environment's MLXGPT_HOME, or else under the
current folder.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from mlxgpt import config as configs
from mlxgpt import config_files, files
from mlxgpt.config import Config
from mlxgpt.corpus import readers
from mlxgpt.corpus.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.corpus.normalize import normalize_text
from mlxgpt.errors import UserError
from mlxgpt.model.gpt import GPT
from mlxgpt.storage import run as runs

logger = logging.getLogger(__name__)

PathLike = str | Path


def home(kind: str, given: PathLike | None = None) -> Path:
    """The folder for `runs` or `data`."""
    return Path(given) if given else Path(os.environ.get("MLXGPT_HOME") or ".") / kind


def resolve(
    tier: int | None = None,
    config: PathLike | Config | None = None,
    recipe: str | None = None,
    **settings: Any,
) -> tuple[str, Config]:
    """A config's name and content: a tier's by a recipe, a TOML file's, or one at hand; with
    settings changed by their plain names (`n_layer=6`).
    """
    if recipe not in (None, *config_files.RECIPES):
        raise UserError(f"there is no recipe {recipe}", f"use {' or '.join(config_files.RECIPES)}.")
    if recipe and tier is None:
        raise UserError(
            f"--recipe {recipe} of what is not said",
            "add --tier 1 or --tier 2; or, to train for M minutes at a size made for these, "
            "mlxgpt train --recipe modern --max-minutes M.",
        )
    if tier is not None and config is not None:
        raise UserError("a tier and a config are given", "give --tier or --config, not both.")
    if isinstance(config, Config):
        name, base = "custom", config
    elif config is not None:
        path = config_files.built_in().get(str(config), Path(config))
        name, base = path.stem, config_files.load(path)
    elif tier is not None:
        recipe = recipe or "classic"
        name, base = config_files.tier_name(tier, recipe), config_files.tier(tier, recipe)
    else:
        raise UserError("it is not said what to train", "give --tier 1, or --config FILE.")
    return name, configs.override(base, settings)


def opened(
    run: str | None,
    checkpoint: str,
    runs_dir: PathLike | None,
    *,
    fall_back: bool = True,
) -> tuple[runs.Run, GPT, int]:
    """A run, the model of one of its checkpoints, and its step; see `load_model`."""
    found = runs.find(run, home("runs", runs_dir))
    model, saved = runs.load_model(found, checkpoint, fall_back=fall_back)
    logger.info("%s, step %s", found.folder, f"{saved.step:,}")
    return found, model, saved.step


def prompts_in(path: PathLike) -> list[str]:
    """The prompts in a file: its lines, but for empty ones; or of JSON lines or a JSON array, by
    its name, strings or the field `prompt`.

    Raises:
        UserError: if it cannot be read, a line of JSON is neither, or there is none.
    """
    try:
        text = normalize_text(readers.read_small_text(Path(path)))
    except OSError as error:
        raise files.os_error(error, "read", Path(path), "give a text of prompts.") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}", "give a text of prompts.") from error
    # Not by str.splitlines, which also cuts at U+2028, U+0085, form feeds, ….
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [line for _, line in lines]
    if Path(path).suffix.lower() in (".jsonl", ".ndjson", ".json"):
        prompts = _json_prompts(text, path) or [_prompt_of(line, where) for where, line in lines]
    if not prompts:
        raise UserError(f"there is no prompt in {path}", "write one a line.")
    return prompts


def _json_prompts(text: str, path: PathLike) -> list[str]:
    """The prompts of a file that is one JSON value, such as an array; none of another file."""
    try:
        tree = files.parse_json(text)
    except ValueError:
        return []
    entries = tree if isinstance(tree, list) else [tree]
    return [_prompt_in(entry, f"{path}, entry {n}") for n, entry in enumerate(entries, 1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        return _prompt_in(files.parse_json(line), where)
    except ValueError:
        return _prompt_in(None, where)


def _prompt_in(tree: Any, where: str) -> str:
    prompt = tree.get("prompt") if isinstance(tree, dict) else tree
    if isinstance(prompt, str):
        return prompt
    raise UserError(
        f"{where}: no prompt",
        'write one a line, "Once upon a time" or {"prompt": "Once upon a time"}.',
    )


def data_of(run: runs.Run, data_dir: Path) -> Dataset:
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
