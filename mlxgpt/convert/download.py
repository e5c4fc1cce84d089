"""A GPT-2 of the Hugging Face hub, downloaded into the hub's cache: weights as safetensors, config,
tokenizer. What is in the cache is not downloaded again.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from mlxgpt.convert.huggingface import CONFIG, INDEX, WEIGHTS
from mlxgpt.convert.tokenizers import ADDED, JSON, MERGES, SETTINGS, SPECIAL, VOCAB
from mlxgpt.data import http
from mlxgpt.storage.run import CHAT_TEMPLATE
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# By their common names.
KNOWN = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large")},
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)


def fetch(name: str) -> tuple[Path, str]:
    """The folder of a model of the hub, and its commit.

    Args:
        name: one of KNOWN, or OWNER/NAME.

    Raises:
        UserError: if it could not be downloaded, is not a GPT-2 in safetensors, or the disk is too
            full for it.
    """
    from huggingface_hub import HfApi, constants

    path = KNOWN.get(name, name)
    http.configure_hub(show_warnings=True)
    try:
        info = HfApi().model_info(path, files_metadata=True, timeout=http.answer_timeout())
        return _download(path, info), str(info.sha)
    except UserError:
        raise
    except Exception as error:  # whatever its transports raise
        problem = f"the Hugging Face hub: {http.reason(error)}"
        if http.is_unreachable(error) and (folder := _cached(path)):
            logger.info(f"{problem}; using {path} from the cache")
            return folder, folder.name
        http.raise_disk_error(error, Path(constants.HF_HUB_CACHE))
        raise UserError(f"{path} could not be downloaded ({problem})", _remedy(error)) from error


def _download(path: str, info: Any) -> Path:
    """The folder with all files that an import reads, at the commit of `info`."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    commit = str(info.sha)
    known = {file.rfilename: file for file in info.siblings or []}
    if CONFIG not in known:
        raise UserError(f"{path} has no {CONFIG}", "name a GPT-2 of the hub, such as gpt2.")
    weights = [WEIGHTS] if WEIGHTS in known else [file for file in known if SHARD.fullmatch(file)]
    if not weights:
        raise UserError(
            f"{path} has no {WEIGHTS}",
            "its weights are a pickle, which can run code: name a model with safetensors.",
        )
    folder = Path(hf_hub_download(path, CONFIG, revision=commit)).parent
    missing = [file for file in weights if not try_to_load_from_cache(path, file, revision=commit)]
    need, free = sum(known[file].size or 0 for file in missing), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{path} takes {need / 1e9:,.2f} GB, and {free / 1e9:,.2f} are free",
            "free some space, or set HF_HOME to a folder on a larger disk.",
        )
    if missing:
        logger.info(f"downloading {path} ({need / 1e6:,.0f} MB) from the Hugging Face hub")
    tokenizer = (JSON,) if JSON in known else (VOCAB, MERGES)
    others = (*tokenizer, SETTINGS, ADDED, SPECIAL, CHAT_TEMPLATE, INDEX)
    for file in [*(file for file in others if file in known), *weights]:
        place = Path(hf_hub_download(path, file, revision=commit))
        lfs = known[file].lfs
        if lfs and files.sha256(place) != lfs.sha256:
            place.resolve().unlink()  # or the cache would give it again
            raise http.Trouble(f"{file} was damaged in transit: its hash is not the hub's")
    return folder


def _cached(path: str) -> Path | None:
    """The state of a model that was downloaded last."""
    from huggingface_hub import constants

    states = Path(constants.HF_HUB_CACHE, f"models--{path.replace('/', '--')}", "snapshots")
    downloaded = [s for s in files.matching(states, "*") if files.matching(s, "*.safetensors")]
    return max(downloaded, key=lambda state: state.stat().st_mtime, default=None)


def _remedy(error: Exception) -> str:
    status = http.status(error)
    if status == 403 or "gated" in type(error).__name__.lower():
        return "accept its terms on the hub, and log in here: hf auth login."
    if status in (401, 404):
        return "check the name, OWNER/NAME; what is private or gated needs: hf auth login."
    if status == 429:
        return "wait some minutes, or log in, with hf auth login."
    if http.is_unreachable(error):
        return "check the connection; a model in a folder is imported without one."
    if isinstance(error, OSError) and error.errno in files.REMEDIES:
        return files.REMEDIES[error.errno]
    return "give the same command again: what was downloaded is kept."
