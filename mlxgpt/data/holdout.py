"""Holds a part of the training text back, to judge by what is still being decided: whoever tunes on
the validation text has no text left that tells how good the result is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from mlxgpt.data.dataset import Dataset
from mlxgpt.data.meta import SplitMeta
from mlxgpt.data.token_array import Tokens
from mlxgpt.data.tokenizers.char import byte_lengths
from mlxgpt.utils.errors import UserError

SHARE = 0.1  # of the training text's bytes
MOST_BYTES = 1_000_000


def held_back(dataset: Dataset) -> Dataset:
    """The same data, the end of its training text in the place of the validation text.

    That end is whole documents, the same whatever the tokenizer; of a text that is one document, it
    begins at the first token that lies within the share.

    Raises:
        UserError: if the text is too short.
    """
    train, tokenizer = dataset.meta.train, dataset.tokenizer
    room = int(min(SHARE * train.bytes, MOST_BYTES))
    # The last ids, as many as there are bytes: more than hold `room` bytes, as only an end-of-text
    # has none, and there is one after each document.
    first = max(0, len(dataset.train.ids) - 2 * room)
    ids = np.asarray(dataset.train.ids[first:], dtype=np.int64)
    bytes_from = np.cumsum(byte_lengths(tokenizer)[ids][::-1])[::-1]  # from each id to the end
    within = np.flatnonzero(bytes_from <= room)
    ends = np.flatnonzero(ids[:-1] == tokenizer.end_of_text)
    starts = ends[np.isin(ends + 1, within)] + 1
    start = int(starts[0] if len(starts) else within[0]) if len(within) else len(ids)
    if len(ids) - start < 2 or first + start < 2:
        raise UserError(
            f"{dataset.folder} has too little training text to hold a part of it back",
            "use a longer text.",
        )
    cut, size = first + start, int(bytes_from[start])
    documents = int(np.count_nonzero(ids[start:] == tokenizer.end_of_text))

    def part(begin: int, end: int, documents: int, size: int) -> SplitMeta:
        name = f"{train.sha256} {begin}:{end}"
        return SplitMeta(end - begin, documents, size, hashlib.sha256(name.encode()).hexdigest())

    whole = dataset.train.ids
    meta = replace(
        dataset.meta,
        train=part(0, cut, max(1, train.documents - documents), train.bytes - size),
        val=part(cut, len(whole), max(1, documents), size),
    )
    return replace(
        dataset,
        meta=meta,
        train=Tokens(whole[:cut], dataset.train.vocab_size),
        val=Tokens(whole[cut:], dataset.train.vocab_size),
    )
