"""nanoGPT's token arrays: a folder with train.bin and val.bin, uint16 ids of GPT-2's encoding, and
nothing that describes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlxgpt import files
from mlxgpt.corpus import bpe
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.corpus.meta import FORMAT, SPLITS, Meta, SplitMeta
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError

CHUNK = 1 << 24  # ids at a time


def open_arrays(folder: Path) -> tuple[Meta, BPETokenizer, Tokens, Tokens]:
    """Open such a folder: its tokenizer, its arrays, and what our meta.json would say of them,
    which is counted.

    Raises:
        UserError: if there is a meta.pkl, an array is missing, or holds an id that GPT-2 has not.
    """
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} has a meta.pkl: its ids are not GPT-2's, and a pickle can run code",
            "prepare the text itself: --source FILE.",
        )
    tokenizer = bpe.gpt2()
    sizes = np.array([len(token) for token in tokenizer.tokens] + [0])
    arrays, counts = [], []
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if not path.is_file():
            raise UserError(f"{folder} has no {path.name}", "nanoGPT's prepare.py writes both.")
        if path.stat().st_size % 2 or not path.stat().st_size:
            raise UserError(f"{path} is cut short or empty", "write it again.")
        ids = np.memmap(path, dtype="<u2", mode="r")
        documents = size = 0
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            if (most := int(chunk.max())) >= tokenizer.vocab_size:
                raise UserError(
                    f"{path} holds id {most}, and GPT-2 has {tokenizer.vocab_size:,}",
                    "these are not GPT-2's ids: prepare the text itself, --source FILE.",
                )
            documents += int((chunk == tokenizer.end_of_text).sum())
            size += int(sizes[chunk].sum())
        counts.append(SplitMeta(len(ids), documents, size, files.sha256(path)))
        arrays.append(Tokens(ids, tokenizer.vocab_size))
    origin = {"nanogpt": folder.name}
    meta = Meta(FORMAT, "<u2", tokenizer.vocab_size, tokenizer.fingerprint, origin, *counts)
    train, val = arrays
    return meta, tokenizer, train, val
