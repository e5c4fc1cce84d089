"""Hold out the end of the training text for tuning, so that the validation text stays unseen."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from mlxgpt.data.dataset import Dataset
from mlxgpt.data.meta import SplitMeta
from mlxgpt.data.token_array import TokenArray
from mlxgpt.data.tokenizers.base import byte_lengths
from mlxgpt.utils.errors import UserError

HOLDOUT_FRACTION = 0.1  # of the training text's bytes
MAX_HOLDOUT_BYTES = 1_000_000


def hold_out_from_train(dataset: Dataset) -> Dataset:
    """Replace the validation text of a dataset with the end of its training text.

    The held-out part consists of whole documents, the same for every tokenizer; in a single
    document, it starts at the first token within the fraction.

    Raises:
        UserError: if the text is too short.
    """
    train, tokenizer = dataset.meta.train, dataset.tokenizer
    max_bytes = int(min(HOLDOUT_FRACTION * train.bytes, MAX_HOLDOUT_BYTES))
    # Two ids per byte are enough: only end-of-text has no bytes, once per document.
    tail_start = max(0, len(dataset.train.ids) - 2 * max_bytes)
    ids = np.asarray(dataset.train.ids[tail_start:], dtype=np.int64)
    bytes_to_end = np.cumsum(byte_lengths(tokenizer)[ids][::-1])[::-1]  # from each id to the end
    candidates = np.flatnonzero(bytes_to_end <= max_bytes)
    ends = np.flatnonzero(ids[:-1] == tokenizer.end_of_text)
    starts = ends[np.isin(ends + 1, candidates)] + 1
    start = int(starts[0] if len(starts) else candidates[0]) if len(candidates) else len(ids)
    if len(ids) - start < 2 or tail_start + start < 2:
        raise UserError(
            f"{dataset.folder} has too little training data for a held-out part",
            "use more data.",
        )
    split_index, size = tail_start + start, int(bytes_to_end[start])
    documents = int(np.count_nonzero(ids[start:] == tokenizer.end_of_text))

    def build_split_meta(begin: int, end: int, documents: int, size: int) -> SplitMeta:
        name = f"{train.sha256} {begin}:{end}"
        return SplitMeta(end - begin, documents, size, hashlib.sha256(name.encode()).hexdigest())

    all_ids = dataset.train.ids
    meta = replace(
        dataset.meta,
        train=build_split_meta(
            0, split_index, max(1, train.documents - documents), train.bytes - size
        ),
        val=build_split_meta(split_index, len(all_ids), max(1, documents), size),
    )
    return replace(
        dataset,
        meta=meta,
        train=TokenArray(all_ids[:split_index], dataset.train.vocab_size),
        val=TokenArray(all_ids[split_index:], dataset.train.vocab_size),
    )
