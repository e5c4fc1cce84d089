"""Load tokenizer.json files, written by mlxgpt or other programs.

Special tokens in text are encoded as ordinary text, as with `split_special_tokens=True` in
transformers; added tokens that are not special are encoded as tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxgpt.data.tokenizers.base import END_OF_TEXT, END_OF_TEXT_KEY, AddedToken, Tokenizer
from mlxgpt.data.tokenizers.bpe import (
    BPETokenizer,
    bytes_to_unicode,
    parse_merges,
    token_bytes_to_string,
)
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

MAX_TOKENIZER_BYTES = 1 << 26  # 64 MiB; GPT-2's tokenizer.json has 3.6 MB


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json written by `to_json`.

    Raises:
        UserError: if it is missing, or was not written by mlxgpt.
        OSError: if it cannot be read.
    """
    try:
        text = files.read_small(path, MAX_TOKENIZER_BYTES)
        with json_files.recursion_error_as_value_error():
            tree = json_files.parse_json(text)
            end_tokens = [
                token["content"] for token in tree["added_tokens"] if token.get(END_OF_TEXT_KEY)
            ]
            tokenizer = build_tokenizer(tree, (end_tokens or [None])[0])
            if json.loads(tokenizer.to_json()) != tree:
                raise ValueError("it is a different kind of tokenizer")
            return tokenizer
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist", "copy the complete folder, or create it again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not an mlxgpt tokenizer: {error}", "restore it, or create it again."
        ) from error


def build_tokenizer(
    tree: Mapping[str, Any], end_of_text: str | None = None, special_tokens: Collection[str] = ()
) -> Tokenizer:
    """Build the tokenizer of a parsed tokenizer.json, byte-level BPE or characters, with the same
    ids.

    Args:
        tree: the parsed file; if an added token is listed twice, the last entry counts.
        end_of_text: name of the end-of-text token; default: <|endoftext|>, if it exists.
        special_tokens: names of special tokens; they may be missing from `added_tokens`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is not a supported tokenizer.
    """
    model = tree["model"]
    if model.get("type", "BPE") != "BPE" or tree.get("normalizer"):
        raise ValueError("it is not a plain BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"its {name} is {model[name]!r}")
    vocab = dict(model["vocab"])
    added_by_name = _parse_added_tokens(tree.get("added_tokens") or (), vocab)
    merges = parse_merges(
        pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]
    )
    is_byte_level = bool(tree.get("pre_tokenizer") or merges)
    if is_byte_level:
        pre_tokenizer = tree["pre_tokenizer"] or {}
        has_gpt2_flags = not pre_tokenizer.get("add_prefix_space") and pre_tokenizer.get(
            "use_regex", True
        )
        if pre_tokenizer.get("type") != "ByteLevel" or not has_gpt2_flags:
            raise ValueError("its pre-tokenizer differs from GPT-2's")
        required_tokens = [
            *bytes_to_unicode().values(),
            *(token_bytes_to_string(left + right) for left, right in merges),
        ]
    else:
        required_tokens = [
            token for token in vocab if len(token) == 1 and token not in added_by_name
        ]
    for name in required_tokens:
        if name not in vocab:
            raise ValueError(f"its vocabulary lacks the token {name!r}")
    for token in sorted(vocab.keys() - set(required_tokens) - added_by_name.keys()):
        if token not in special_tokens and not _looks_special(token):
            raise ValueError(f"no merge produces its token {token!r}")
        added_by_name[token] = AddedToken(vocab[token], token)
    end_id = next(
        (added_by_name[name].id for name in (end_of_text, END_OF_TEXT) if name in added_by_name),
        None,
    )
    added_tokens = [
        replace(token, special=token.special or token.id == end_id)
        for token in added_by_name.values()
    ]
    if is_byte_level:
        ids = [vocab[name] for name in required_tokens]
        return BPETokenizer(merges, ids=ids, added_tokens=added_tokens, end_of_text=end_id)
    return CharTokenizer.from_ids(
        {name: vocab[name] for name in required_tokens}, added_tokens, end_id
    )


def add_special_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Add special tokens that a byte-level BPE does not have yet; the last one becomes its
    end-of-text token.
    """
    tree = json.loads(tokenizer.to_json())
    new_names = [name for name in names if name not in tokenizer.added_tokens.ids]
    for id, name in enumerate(new_names, tokenizer.vocab_size):
        tree["added_tokens"].append({"id": id, "content": name, "special": True})
    return build_tokenizer(tree, end_of_text=names[-1])


def _parse_added_tokens(
    entries: Iterable[Mapping[str, Any]], vocab: Mapping[str, int]
) -> dict[str, AddedToken]:
    """Parse added tokens, by their content.

    Raises:
        ValueError: if a token has two ids, or unsupported flags such as `lstrip`.
    """
    tokens: dict[str, AddedToken] = {}
    for entry in entries:
        content, id, special = entry["content"], entry["id"], bool(entry.get("special", False))
        expected_id = tokens[content].id if content in tokens else vocab.get(content, id)
        if type(content) is not str or expected_id != id:
            raise ValueError(f"the token {content!r} has two ids: {id!r} and {expected_id!r}")
        flags = [name for name in ("single_word", "lstrip", "rstrip") if entry.get(name)]
        if flags and not special:
            raise ValueError(f"the added token {content!r} has {flags[0]}, which is not supported")
        tokens[content] = AddedToken(id, content, special)
    return tokens


def _looks_special(token: str) -> bool:
    """Whether a token's name looks like a special token, such as <pad> or [PAD]."""
    return (token[:1], token[-1:]) in (("<", ">"), ("[", "]")) and len(token) > 2
