"""Reads a tokenizer.json: the one room that knows every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.corpus.tokenizer import CharTokenizer, Tokenizer
from mlxgpt.errors import UserError

LARGEST = 1 << 26  # bytes; GPT-2's has 3.6 MB


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json that `to_json` wrote.

    Raises:
        UserError: if there is none, or it is not one of ours.
    """
    try:
        text = files.read_small(path, LARGEST)
        with files.not_too_deep():
            return _from_tree(files.parse_json(text))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "copy the whole folder, or make it again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a tokenizer of mlxgpt: {error}", "restore it, or make it again."
        ) from error


def _from_tree(tree: Any) -> Tokenizer:
    tokenizer: Tokenizer
    if tree["pre_tokenizer"]:
        tokenizer = BPETokenizer.from_json_merges(tree["model"]["merges"])
    else:
        vocab = tree["model"]["vocab"]
        tokenizer = CharTokenizer(vocab, end_of_text=bool(tree["added_tokens"]))
    if json.loads(tokenizer.to_json()) != tree:
        raise ValueError("it describes another kind of tokenizer")
    return tokenizer
