"""Download of GPT-2 models (safetensors, config, tokenizer) from the Hugging Face hub into its
cache. Cached files are not downloaded again.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from mlxgpt.convert.huggingface import CONFIG_JSON, WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from mlxgpt.convert.tokenizers import (
    ADDED_TOKENS_JSON,
    MERGES_TXT,
    SPECIAL_TOKENS_JSON,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    VOCAB_JSON,
)
from mlxgpt.data import http
from mlxgpt.data.chat_template import CHAT_TEMPLATE
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# Short name -> OWNER/NAME on the hub.
MODEL_ALIASES = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large")},
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def download_model(name: str) -> tuple[Path, str]:
    """Download a model from the hub, and return its folder in the cache and its commit hash.

    Args:
        name: one of MODEL_ALIASES, or OWNER/NAME.

    Raises:
        UserError: if the download fails, the model has no config.json or safetensors, or the disk
            is too full.
    """
    from huggingface_hub import HfApi, constants

    repo_id = MODEL_ALIASES.get(name, name)
    http.configure_hub(show_warnings=True)
    try:
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=http.response_timeout())
        return _download_files(repo_id, info), str(info.sha)
    except UserError:
        raise
    except Exception as error:  # the hub's transports raise many types
        problem = f"the Hugging Face hub: {http.describe_download_error(error)}"
        if http.is_unreachable(error) and (folder := _find_cached_snapshot(repo_id)):
            logger.info(f"{problem}; using {repo_id} from the cache")
            return folder, folder.name
        http.raise_disk_error(error, Path(constants.HF_HUB_CACHE))
        raise UserError(
            f"{repo_id} could not be downloaded ({problem})", _choose_remedy(error)
        ) from error


WEIGHTS_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)


def _download_files(repo_id: str, info: Any) -> Path:
    """Download the files that an import needs, at the commit of `info`, and return their folder."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    commit = str(info.sha)
    repo_files = {file.rfilename: file for file in info.siblings or []}
    if CONFIG_JSON not in repo_files:
        raise UserError(
            f"{repo_id} has no {CONFIG_JSON}", "use a GPT-2 model from the hub, such as gpt2."
        )
    weight_files = (
        [WEIGHTS_FILE]
        if WEIGHTS_FILE in repo_files
        else [file for file in repo_files if WEIGHTS_SHARD.fullmatch(file)]
    )
    if not weight_files:
        raise UserError(
            f"{repo_id} has no {WEIGHTS_FILE}",
            "its weights are a pickle, which can run code: use a model with safetensors.",
        )
    folder = Path(hf_hub_download(repo_id, CONFIG_JSON, revision=commit)).parent
    missing = [
        file for file in weight_files if not try_to_load_from_cache(repo_id, file, revision=commit)
    ]
    required_bytes = sum(repo_files[file].size or 0 for file in missing)
    free_bytes = shutil.disk_usage(folder).free
    if required_bytes > free_bytes:
        raise UserError(
            f"{repo_id} needs {required_bytes / 1e9:,.2f} GB of disk space, but only "
            f"{free_bytes / 1e9:,.2f} GB are free",
            "free some space, or set HF_HOME to a folder on a larger disk.",
        )
    if missing:
        logger.info(
            f"downloading {repo_id} ({required_bytes / 1e6:,.0f} MB) from the Hugging Face hub"
        )
    tokenizer_files = (
        (TOKENIZER_JSON,) if TOKENIZER_JSON in repo_files else (VOCAB_JSON, MERGES_TXT)
    )
    other_files = (
        *tokenizer_files,
        TOKENIZER_CONFIG_JSON,
        ADDED_TOKENS_JSON,
        SPECIAL_TOKENS_JSON,
        CHAT_TEMPLATE,
        WEIGHTS_INDEX_FILE,
    )
    for file in [*(file for file in other_files if file in repo_files), *weight_files]:
        local_path = Path(hf_hub_download(repo_id, file, revision=commit))
        lfs = repo_files[file].lfs
        if lfs and files.sha256_file(local_path) != lfs.sha256:
            local_path.resolve().unlink()  # else the cache returns it again
            raise http.DownloadError(
                f"{file} was damaged in transit: its hash differs from the hub's"
            )
    return folder


def _find_cached_snapshot(repo_id: str) -> Path | None:
    """Folder of a model's most recently downloaded snapshot, or None."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
    downloaded = [
        s for s in files.list_matching(snapshots, "*") if files.list_matching(s, "*.safetensors")
    ]
    return max(downloaded, key=lambda snapshot: snapshot.stat().st_mtime, default=None)


def _choose_remedy(error: Exception) -> str:
    status = http.http_status(error)
    if status == 403 or "gated" in type(error).__name__.lower():
        return "accept its terms on the hub, then log in: hf auth login"
    if status in (401, 404):
        return "check the name, OWNER/NAME; for private or gated models, log in: hf auth login"
    if status == 429:
        return "wait a few minutes, or log in: hf auth login"
    if http.is_unreachable(error):
        return "check the connection; a model in a local folder needs none."
    if isinstance(error, OSError) and error.errno in files.REMEDIES:
        return files.REMEDIES[error.errno]
    return "run the same command again: finished downloads are kept."
