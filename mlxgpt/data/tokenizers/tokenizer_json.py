"""Reads a tokenizer.json, ours or another program's: the one reader of every kind of tokenizer.

In a text that is encoded, special tokens are text, as with `split_special_tokens=True` in
transformers; added tokens that are not special are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxgpt.data.tokenizers.bpe import BPETokenizer, byte_letters, merges_of_json, spelled
from mlxgpt.data.tokenizers.char import END_OF_TEXT, MARK, AddedToken, CharTokenizer, Tokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

LARGEST = 1 << 26  # bytes; GPT-2's has 3.6 MB


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json that `to_json` wrote.

    Raises:
        UserError: if there is none, or it is not one of ours.
        OSError: if it cannot be read.
    """
    try:
        text = files.read_small(path, LARGEST)
        with files.not_too_deep():
            tree = files.parse_json(text)
            marked = [token["content"] for token in tree["added_tokens"] if token.get(MARK)]
            tokenizer = tokenizer_of(tree, (marked or [None])[0])
            if json.loads(tokenizer.to_json()) != tree:
                raise ValueError("it describes another kind of tokenizer")
            return tokenizer
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist", "copy the whole folder, or make it again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a tokenizer of mlxgpt: {error}", "restore it, or make it again."
        ) from error


def tokenizer_of(
    tree: Mapping[str, Any], end_of_text: str | None = None, special: Collection[str] = ()
) -> Tokenizer:
    """The tokenizer that a parsed tokenizer.json describes: byte-level BPE, or characters. Each
    token has the id that it has there.

    Args:
        tree: of an added token that it lists twice, the last settings count.
        end_of_text: the token that ends a text; default: <|endoftext|> where there is one.
        special: names of special tokens, which may be in the vocabulary only.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is another kind of tokenizer.
    """
    model = tree["model"]
    if model.get("type", "BPE") != "BPE" or tree.get("normalizer"):
        raise ValueError("it is not a plain BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"its {name} is {model[name]!r}")
    vocab = dict(model["vocab"])
    declared = _declared(tree.get("added_tokens") or (), vocab)
    merges = merges_of_json(
        pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]
    )
    bytewise = bool(tree.get("pre_tokenizer") or merges)
    if bytewise:
        cut = tree["pre_tokenizer"] or {}
        whole = not cut.get("add_prefix_space") and cut.get("use_regex", True)
        if cut.get("type") != "ByteLevel" or not whole:
            raise ValueError("it does not cut texts as GPT-2 does")
        names = [*byte_letters().values(), *(spelled(left + right) for left, right in merges)]
    else:
        names = [token for token in vocab if len(token) == 1 and token not in declared]
    for name in names:
        if name not in vocab:
            raise ValueError(f"its vocabulary lacks the token {name!r}")
    for token in sorted(vocab.keys() - set(names) - declared.keys()):
        if token not in special and not _is_mark(token):
            raise ValueError(f"no merge makes its token {token!r}")
        declared[token] = AddedToken(vocab[token], token)
    end = next((declared[name].id for name in (end_of_text, END_OF_TEXT) if name in declared), None)
    added = [
        replace(token, special=token.special or token.id == end) for token in declared.values()
    ]
    if bytewise:
        ids = [vocab[name] for name in names]
        return BPETokenizer(merges, ids=ids, added=added, end_of_text=end)
    return CharTokenizer.from_ids({name: vocab[name] for name in names}, added, end)


def _declared(
    added: Iterable[Mapping[str, Any]], vocab: Mapping[str, int]
) -> dict[str, AddedToken]:
    """Added tokens by their content.

    Raises:
        ValueError: if files do not agree on an id, or a token takes in what is around it.
    """
    tokens: dict[str, AddedToken] = {}
    for tree in added:
        content, id, special = tree["content"], tree["id"], bool(tree.get("special", False))
        known = tokens[content].id if content in tokens else vocab.get(content, id)
        if type(content) is not str or known != id:
            raise ValueError(f"the token {content!r} has two ids: {id!r} and {known!r}")
        flags = [name for name in ("single_word", "lstrip", "rstrip") if tree.get(name)]
        if flags and not special:
            raise ValueError(f"the added token {content!r} has {flags[0]}, which is not known here")
        tokens[content] = AddedToken(id, content, special)
    return tokens


def _is_mark(token: str) -> bool:
    """Whether a token that no merge makes is a special one, by its name, such as <pad> or [PAD]."""
    return (token[:1], token[-1:]) in (("<", ">"), ("[", "]")) and len(token) > 2
