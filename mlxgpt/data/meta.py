"""meta.json of a data folder: describes its token arrays and where their text comes from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxgpt.data.example_array import EXAMPLE_DTYPE
from mlxgpt.data.token_array import dtype_for
from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError

META_FORMAT_VERSION = 1  # shared by meta.json, unfinished.json and progress.json
EXAMPLES_FORMAT_VERSION = 2  # of a meta.json that describes examples
SPLITS = ("train", "val")
RENAMED_ORIGIN = ("storybook", "synthetic")  # (old, new) key in `origin`


@dataclass(frozen=True)
class SplitMeta:
    """Size of one split in tokens, documents and UTF-8 bytes of text (without end-of-text), and the
    SHA-256 of its token array file.
    """

    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetMeta:
    """Contents of a data folder's meta.json."""

    format: int
    dtype: str
    vocab_size: int
    tokenizer: str
    origin: dict[str, Any]
    train: SplitMeta
    val: SplitMeta

    def to_json(self) -> str:
        return json_files.dump_checksummed(asdict(self))

    @property
    def has_examples(self) -> bool:
        """Whether the arrays contain examples, see example_array.py."""
        return self.format == EXAMPLES_FORMAT_VERSION

    @property
    def has_pairs(self) -> bool:
        """Whether the examples are preference pairs."""
        return self.has_examples and bool(self.origin["examples"].get("pairs"))

    @property
    def fingerprint(self) -> str:
        """Hash of both splits and the tokenizer: equal fingerprints mean the same batches."""
        hashes = [self.train.sha256, self.val.sha256, self.tokenizer]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def read_meta(folder: Path) -> DatasetMeta:
    """Read a data folder's meta.json.

    Raises:
        UserError: if it is missing, damaged or in a newer format.
        OSError: if it cannot be read.
    """
    path = folder / "meta.json"
    try:
        tree = json_files.read_checksummed(path, EXAMPLES_FORMAT_VERSION)
        old_key, new_key = RENAMED_ORIGIN
        if old_key in tree["origin"]:
            tree["origin"][new_key] = tree["origin"].pop(old_key)
        train, val = (SplitMeta(**tree.pop(split)) for split in SPLITS)
        meta = DatasetMeta(**tree, train=train, val=val)
        sizes = [meta.vocab_size, *(n for s in (train, val) for n in (s.tokens, s.bytes))]
        if any(type(n) is not int or not 0 < n < 1 << 48 for n in sizes):
            raise ValueError("it has invalid sizes")
        dtype = EXAMPLE_DTYPE if meta.has_examples else dtype_for(meta.vocab_size)
        if meta.dtype != dtype or not isinstance(meta.origin, dict):
            raise ValueError("its fields are inconsistent")
        if meta.has_examples and not isinstance(meta.origin.get("examples"), dict):
            raise ValueError("it does not describe its examples")
        if meta.has_pairs and any(s.documents % 2 for s in (train, val)):
            raise ValueError("it has half a pair")
        return meta
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} contains no prepared data", "run mlxgpt prepare, or use --source."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error}", "move this folder away and prepare the data again."
        ) from error
