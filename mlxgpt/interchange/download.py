"""A GPT-2 of the Hugging Face hub, in its cache: weights as safetensors, config, tokenizer. What is
there is not asked for again; what broke off goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.corpus import web
from mlxgpt.errors import UserError
from mlxgpt.interchange.huggingface import CONFIG, INDEX, WEIGHTS
from mlxgpt.interchange.tokenizers import ADDED, JSON, MERGES, SETTINGS, SPECIAL, VOCAB
from mlxgpt.storage.run import CHAT_TEMPLATE

# By the names that everybody calls them by.
KNOWN = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large")},
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def fetch(name: str, note: Callable[[str], None]) -> tuple[Path, str]:
    """The folder of a model of the hub, and the commit that it is of.

    Args:
        name: one of KNOWN, or OWNER/NAME.
        note: takes a line on what is being done.

    Raises:
        UserError: if it cannot be had, is no GPT-2 in safetensors, or the disk is too full for it.
    """
    from huggingface_hub import constants

    path = KNOWN.get(name, name)
    _be_quiet()
    try:
        if constants.HF_HUB_OFFLINE:
            raise web.NoAnswer("HF_HUB_OFFLINE is set")
        web.must_answer(f"{constants.ENDPOINT}/api/models/{path}", note)
        with web.patience(note, tries_again=True):
            return _fetch(path, note)
    except UserError:
        raise
    except Exception as error:  # whatever its transports raise
        if isinstance(error, web.NoAnswer) and (there := _cached(path)):
            note(f"the Hugging Face hub: {web.reason(error)}; taking what was fetched before")
            return there, there.name
        if broken := web.disk_error(error):
            cache = Path(constants.HF_HUB_CACHE)
            raise files.os_error(broken, "keep a download in", cache) from error
        raise UserError(
            f"{path} cannot be had (the Hugging Face hub: {web.reason(error)})", _remedy(error)
        ) from error


def _fetch(path: str, note: Callable[[str], None]) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    info = HfApi().model_info(path, files_metadata=True)
    known = {one.rfilename: one for one in info.siblings or []}
    commit = str(info.sha)

    def get(file: str) -> Path:
        place = Path(hf_hub_download(path, file, revision=commit))
        lfs = known[file].lfs
        if lfs and files.sha256(place) != lfs.sha256:
            place.resolve().unlink()  # or it would be taken for whole the next time
            raise web.Trouble(f"{file} is not what the hub has: it was damaged on its way")
        return place

    if CONFIG not in known:
        raise UserError(f"{path} has no {CONFIG}", "name a GPT-2 of the hub, such as gpt2.")
    folder = get(CONFIG).parent
    tokens = (JSON,) if JSON in known else (VOCAB, MERGES)
    for file in (*tokens, SETTINGS, ADDED, SPECIAL, CHAT_TEMPLATE):
        if file in known:
            get(file)
    weights = list(_weights(path, known, get))
    missing = [file for file in weights if not try_to_load_from_cache(path, file, revision=commit)]
    need = sum(known[file].size or 0 for file in missing)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{path} takes {need / 1e9:,.2f} GB, and {free / 1e9:,.2f} are free",
            "free some space, or set HF_HOME to a folder on a larger disk.",
        )
    if missing:
        note(f"getting {path} ({need / 1e6:,.0f} MB) from the Hugging Face hub")
    for file in weights:
        get(file)
    return folder, commit


def _weights(path: str, known: dict[str, Any], get: Callable[[str], Path]) -> Iterator[str]:
    """The files that hold the weights."""
    if WEIGHTS in known:
        yield WEIGHTS
        return
    if INDEX not in known:
        raise UserError(
            f"{path} has no {WEIGHTS}",
            "its weights are a pickle, which can run code: name a model with safetensors.",
        )
    places = json.loads(files.read_small(get(INDEX)))["weight_map"]
    for file in sorted(set(places.values())):
        if file not in known:
            raise web.Trouble(f"{INDEX} tells of {file}, which is not there")
        yield file


def _cached(path: str) -> Path | None:
    """The newest state of a model that was fetched before."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        states = [
            state
            for repository in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if (repository.repo_id, repository.repo_type) == (path, "model")
            for state in repository.revisions
        ]
        for state in sorted(states, key=lambda state: state.last_modified, reverse=True):
            if files.matching(state.snapshot_path, "*.safetensors"):
                return state.snapshot_path
    return None


def _be_quiet() -> None:
    """Errors are told by us; progress only where there is a terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _remedy(error: Exception) -> str:
    status = web.status(error)
    if status == 403 or "gated" in type(error).__name__.lower():
        return "accept its terms on the hub, and log in here: hf auth login."
    if status in (401, 404):
        return "check the name, OWNER/NAME; what is private or gated needs: hf auth login."
    if status == 429:
        return "wait some minutes, or log in, with hf auth login."
    if isinstance(error, web.NoAnswer):
        return "check the connection; a model in a folder is imported without one."
    if isinstance(error, OSError) and error.errno in files.REMEDIES:
        return files.REMEDIES[error.errno]
    return "give the same command again: what was fetched is kept."
