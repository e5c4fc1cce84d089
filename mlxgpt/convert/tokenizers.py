"""A tokenizer as Hugging Face keeps it: tokenizer.json, or GPT-2's vocab.json and merges.txt, with
the added tokens of added_tokens.json and tokenizer_config.json; and ours as these are read by
transformers, mlx-lm and `tokenizers`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.char import END_OF_TEXT, Tokenizer, end_name
from mlxgpt.storage.run import CHAT_TEMPLATE
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

JSON, SETTINGS = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"


def read(folder: Path, room: int) -> tuple[Tokenizer, bool]:
    """A folder's tokenizer, and whether texts begin with an end-of-text.

    Args:
        room: ids that the model has. Special tokens beyond them, such as a padding token that no
            model was trained with, are left out.
        note: takes a line on those.

    Raises:
        UserError: if there is none, or it is of another kind than those built here.
    """
    try:
        settings = _optional(folder / SETTINGS)
        decoder = settings.get("added_tokens_decoder")
        named = settings if decoder is not None else settings | _optional(folder / SPECIAL)
        special = {name for name in map(_content, _values(named)) if name}
        if files.is_file(folder / JSON):
            tree = files.read_json(folder / JSON, tokenizer_json.LARGEST)
        else:
            tree = _of_two_files(folder)
        if settings.get("add_prefix_space"):
            raise ValueError("it puts a space before each text (add_prefix_space)")
        # In the order in which transformers reads them, the last one counting.
        older = _optional(folder / ADDED).items()
        added = [{"content": t, "id": id, "special": t in special} for t, id in older]
        added += tree.get("added_tokens") or []
        added += [{**token, "id": int(id)} for id, token in (decoder or {}).items()]
        beyond = [t["content"] for t in added if t.get("special") and t["id"] >= room]
        if beyond:
            logger.info(f"left out, as the model has no such ids: {', '.join(sorted(set(beyond)))}")
        added = [token for token in added if token["content"] not in beyond]
        end = _content(named.get("eos_token"))
        tokenizer = tokenizer_json.tokenizer_of({**tree, "added_tokens": added}, end, special)
        first = _first(tree.get("post_processor") or {})
        if settings.get("add_bos_token") is not None:
            bos = _content(named.get("bos_token")) or END_OF_TEXT
            first = bos if settings["add_bos_token"] is True else None
        if first is not None and first != (end_name(tokenizer) or first):
            raise ValueError(f"texts begin with {first!r}, and end with {end_name(tokenizer)!r}")
        return tokenizer, first is not None and tokenizer.end_of_text is not None
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {JSON}", "copy or download the whole folder again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the tokenizer in {folder} is none that is known here: {error}",
            "take a model with GPT-2's own, or one that mlxgpt exported.",
        ) from error


def _optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not be there."""
    tree = files.read_json(path, tokenizer_json.LARGEST) if files.is_file(path) else {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return tree


def _of_two_files(folder: Path) -> dict[str, Any]:
    """GPT-2's vocab.json and merges.txt as a tokenizer.json has them."""
    vocab = files.read_json(folder / VOCAB, tokenizer_json.LARGEST)
    lines = files.read_small(folder / MERGES, tokenizer_json.LARGEST).removeprefix("\ufeff")
    pairs = [line.split() for line in lines.splitlines() if not line.startswith("#version")]
    model = {"vocab": vocab, "merges": [pair for pair in pairs if pair]}
    return {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}


def _values(named: Mapping[str, Any]) -> Iterator[Any]:
    """The special tokens that a tokenizer's settings name."""
    for key, value in named.items():
        if key.endswith("_token"):
            yield value
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from value.values() if isinstance(value, dict) else value or ()


def _content(token: Any) -> str | None:
    """A special token's text, written alone or with its settings."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _first(processor: Mapping[str, Any]) -> str | None:
    """The special token that a post-processor puts before a text."""
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_first, processor["processors"])), None)
    if "cls" in processor:  # RoBERTa's and BERT's
        return str(processor["cls"][0])
    first = (processor.get("single") or [{}])[0]
    name = first.get("SpecialToken", {}).get("id")
    return None if name is None else str(name)


def chat_template(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, or, as older folders have it, one of the
    tokenizer's settings, alone or as the default of several.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        if files.is_file(folder / CHAT_TEMPLATE):
            return files.read_small(folder / CHAT_TEMPLATE)
        if not files.is_file(folder / SETTINGS):
            return None
        told = _optional(folder / SETTINGS).get("chat_template")
        if isinstance(told, list):
            told = {one["name"]: one["template"] for one in told}.get("default")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the chat template in {folder} cannot be read: {error}", "restore it, or move it away."
        ) from error
    return told if isinstance(told, str) else None


def write(folder: Path, tokenizer: Tokenizer, block_size: int, *, add_bos_token: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        block_size: tokens that the model can look at.
        add_bos_token: whether an end-of-text is put before each text.
    """
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers.processors import TemplateProcessing

    written = HuggingFace.from_str(tokenizer.to_json())
    end = end_name(tokenizer)
    if add_bos_token:
        special = [(end, tokenizer.end_of_text)]
        written.post_processor = TemplateProcessing(single=[end, "$A"], special_tokens=special)
    files.write_atomically(folder / JSON, written.to_str())
    tree: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_bos_token": add_bos_token,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would also give token types, which a GPT-2 adds to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if end is not None:
        tree |= dict.fromkeys(("bos_token", "eos_token"), end)
    files.write_atomically(folder / SETTINGS, json.dumps(tree, indent=2) + "\n")
