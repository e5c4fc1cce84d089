"""Open prepared data folders, in mlxgpt's or nanoGPT's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.config import Config
from mlxgpt.data import nanogpt
from mlxgpt.data.example_array import ID_MASK, ExampleArray, PairArray, SplitArray
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.meta import SPLITS, DatasetMeta, SplitMeta, read_meta
from mlxgpt.data.token_array import TokenArray, damaged_array_remedy, scan_token_file
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """An opened data folder: metadata, tokenizer and token arrays."""

    folder: Path
    meta: DatasetMeta
    tokenizer: Tokenizer
    train: SplitArray
    val: SplitArray

    @property
    def name(self) -> str:
        return self.folder.name

    def tokens_per_step(self, config: Config) -> float:
        """Mean number of tokens per optimizer step, without padding."""
        if isinstance(self.train, TokenArray):
            return config.tokens_per_step
        return config.sequences_per_step * self.train.tokens_per_row


def is_prepared(folder: Path) -> bool:
    """Whether a folder contains prepared data, in mlxgpt's or nanoGPT's format."""
    return files.is_file(folder / "meta.json") or files.is_file(folder / "train.bin")


def open_dataset(folder: Path, *, verify: bool = False) -> Dataset:
    """Open a data folder, in mlxgpt's or nanoGPT's format. Arrays that are new or changed since
    they were last verified are read completely to check their hashes.

    Args:
        verify: check the hashes of all arrays.

    Raises:
        UserError: if it is missing, damaged, in a newer format, or its files do not match.
    """
    hash_cache = HashCache(folder, reread=verify)
    is_mlxgpt_format = any(files.exists(folder / name) for name in ("meta.json", "tokenizer.json"))
    if is_prepared(folder) and not is_mlxgpt_format:
        contents = nanogpt.open_nanogpt_arrays(folder, hash_cache)
        hash_cache.save()
        return Dataset(folder, *contents)
    files.reject_symlinks(folder)
    meta = read_meta(folder)
    tokenizer = tokenizer_json.load_tokenizer(folder / "tokenizer.json")
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (meta.tokenizer, meta.vocab_size):
        raise UserError(
            f"{folder}: the token arrays were not encoded with its tokenizer.json",
            "move this folder away and prepare the data again.",
        )
    arrays = [
        _open_array(folder / f"{split}.bin", meta, getattr(meta, split), hash_cache)
        for split in SPLITS
    ]
    hash_cache.save()
    return Dataset(folder, meta, tokenizer, *arrays)


def _open_array(
    path: Path, meta: DatasetMeta, split: SplitMeta, hash_cache: HashCache
) -> SplitArray:
    dtype, remedy = np.dtype(meta.dtype), f"{damaged_array_remedy(path)}."
    id_mask = ID_MASK if meta.has_examples else None
    try:
        expected, size = split.tokens * dtype.itemsize, path.stat().st_size
        if size != expected:
            raise UserError(
                f"{path} has {size:,} bytes, but meta.json expects {expected:,}", remedy
            )
        stats = hash_cache.get_or_compute(
            path.name, [path], lambda: scan_token_file(path, meta.dtype, id_mask=id_mask)
        )
        hash_matches = stats.get("sha256") == split.sha256
        if not hash_matches or not 0 <= stats.get("largest", -1) < meta.vocab_size:
            raise UserError(f"{path} does not match meta.json (checksum or token ids)", remedy)
        with files.add_filename_to_errors(path):
            if meta.has_examples:
                array_class = PairArray if meta.has_pairs else ExampleArray
                return array_class(np.fromfile(path, dtype=dtype), meta.vocab_size)
            return TokenArray(np.memmap(path, dtype=dtype, mode="r"), meta.vocab_size)
    except FileNotFoundError as error:
        raise files.to_user_error(error, "read", path, remedy) from error
