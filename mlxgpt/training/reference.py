"""The reference of DPO: the model that a run is initialized from. Its log-probabilities of all
answers are computed once and stored in the data folder.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxgpt.config import Config
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.example_array import PairArray
from mlxgpt.evaluation.preferences import compute_logprobs
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import load_parameters
from mlxgpt.training.finetune import InitWeights
from mlxgpt.utils import files

logger = logging.getLogger(__name__)


def add_reference(dataset: Dataset, config: Config, weights: InitWeights) -> Dataset:
    """Add the reference's log-probabilities to a dataset of pairs; other datasets are unchanged.

    Args:
        config: dtype and batch size of the forward pass; see `device.resolve_dtype`.
        weights: the reference.
    """
    train, val = dataset.train, dataset.val
    if not isinstance(train, PairArray) or not isinstance(val, PairArray):
        return dataset
    identity = f"{weights.origin['sha256']} {dataset.meta.fingerprint} {config.train.dtype}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    path = dataset.folder / f"reference-{digest[:12]}.bin"
    counts = (train.pair_count, val.pair_count)
    logprobs = _read(path, identity, sum(counts))
    if logprobs is None:
        logger.info(f"computing the reference's log-probabilities of {sum(counts):,} pairs")
        model = GPT(config.model)
        dtype = getattr(mx, config.train.dtype)
        load_parameters(model, tree_map(lambda p: p.astype(dtype), weights.parameters))
        arrays = [compute_logprobs(model, pairs, config) for pairs in (train, val)]
        logprobs = np.concatenate(arrays)
        _write(path, identity, logprobs)
    train_logprobs, val_logprobs = np.split(logprobs, [counts[0]])
    return replace(
        dataset,
        train=replace(train, reference=train_logprobs),
        val=replace(val, reference=val_logprobs),
    )


# A file is the SHA-256 of (identity, values), then the values: float32 [pairs, 2], little-endian.
DIGEST_BYTES = 32
FILE_DTYPE = "<f4"


def _digest(identity: str, values: bytes) -> bytes:
    return hashlib.sha256(identity.encode() + values).digest()


def _read(path: Path, identity: str, count: int) -> np.ndarray | None:
    """Stored log-probabilities [count, 2]; None if they are missing or damaged."""
    try:
        content = files.read_small_bytes(path, DIGEST_BYTES + 8 * count)
    except (FileNotFoundError, ValueError):
        return None
    digest, values = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if digest != _digest(identity, values):
        return None
    return np.frombuffer(values, FILE_DTYPE).reshape(count, 2)


def _write(path: Path, identity: str, logprobs: np.ndarray) -> None:
    values = logprobs.astype(FILE_DTYPE).tobytes()
    try:
        files.write_atomically(path, _digest(identity, values) + values)
    except OSError as error:  # they are computed again next time
        logger.info(f"cannot store the reference's log-probabilities: {error}")
