"""Reads and writes tokenizers as Hugging Face stores them. Read are tokenizer.json, or GPT-2's
vocab.json and merges.txt, with the added tokens of added_tokens.json and tokenizer_config.json;
written are tokenizer.json and tokenizer_config.json, for transformers, mlx-lm and `tokenizers`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.base import END_OF_TEXT, Tokenizer, end_of_text_token
from mlxgpt.storage.run import CHAT_TEMPLATE
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

TOKENIZER_JSON, TOKENIZER_CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
VOCAB_JSON, MERGES_TXT = "vocab.json", "merges.txt"
ADDED_TOKENS_JSON, SPECIAL_TOKENS_JSON = "added_tokens.json", "special_tokens_map.json"


def read_hf_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, bool]:
    """A folder's tokenizer, and whether texts begin with an end-of-text.

    Args:
        vocab_size: ids that the model has. Special tokens beyond them, such as a padding token that
            no model was trained with, are logged and left out.

    Raises:
        UserError: if there is none, or its kind is not supported.
    """
    try:
        settings = _read_optional_json(folder / TOKENIZER_CONFIG_JSON)
        added_decoder = settings.get("added_tokens_decoder")
        token_settings = (
            settings
            if added_decoder is not None
            else settings | _read_optional_json(folder / SPECIAL_TOKENS_JSON)
        )
        special_tokens = {
            name for name in map(_token_text, _iter_special_tokens(token_settings)) if name
        }
        if files.is_file(folder / TOKENIZER_JSON):
            tree = files.read_json(folder / TOKENIZER_JSON, tokenizer_json.MAX_TOKENIZER_BYTES)
        else:
            tree = _read_vocab_and_merges(folder)
        if settings.get("add_prefix_space"):
            raise ValueError("it adds a space before each text (add_prefix_space)")
        # In the order in which transformers reads them, the last one counting.
        legacy_tokens = _read_optional_json(folder / ADDED_TOKENS_JSON).items()
        added_tokens = [
            {"content": text, "id": token_id, "special": text in special_tokens}
            for text, token_id in legacy_tokens
        ]
        added_tokens += tree.get("added_tokens") or []
        added_tokens += [
            {**token, "id": int(token_id)} for token_id, token in (added_decoder or {}).items()
        ]
        out_of_range = [
            token["content"]
            for token in added_tokens
            if token.get("special") and token["id"] >= vocab_size
        ]
        if out_of_range:
            logger.info(
                "skipped special tokens outside the model's vocabulary: "
                f"{', '.join(sorted(set(out_of_range)))}"
            )
        added_tokens = [token for token in added_tokens if token["content"] not in out_of_range]
        eos = _token_text(token_settings.get("eos_token"))
        tokenizer = tokenizer_json.build_tokenizer(
            {**tree, "added_tokens": added_tokens}, eos, special_tokens
        )
        prefix_token = _find_prefix_token(tree.get("post_processor") or {})
        if settings.get("add_bos_token") is not None:
            bos = _token_text(token_settings.get("bos_token")) or END_OF_TEXT
            prefix_token = bos if settings["add_bos_token"] is True else None
        if prefix_token is not None and prefix_token != (
            end_of_text_token(tokenizer) or prefix_token
        ):
            raise ValueError(
                f"texts start with {prefix_token!r}, but end with {end_of_text_token(tokenizer)!r}"
            )
        return tokenizer, prefix_token is not None and tokenizer.end_of_text is not None
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {TOKENIZER_JSON}", "copy or download the complete folder again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the tokenizer in {folder} is not supported: {error}",
            "use a model with GPT-2's tokenizer, or one that mlxgpt exported.",
        ) from error


def _read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    tree = files.read_json(path, tokenizer_json.MAX_TOKENIZER_BYTES) if files.is_file(path) else {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return tree


def _read_vocab_and_merges(folder: Path) -> dict[str, Any]:
    """GPT-2's vocab.json and merges.txt as a tokenizer.json has them."""
    vocab = files.read_json(folder / VOCAB_JSON, tokenizer_json.MAX_TOKENIZER_BYTES)
    merges = files.read_small(folder / MERGES_TXT, tokenizer_json.MAX_TOKENIZER_BYTES)
    lines = merges.removeprefix("\ufeff").splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#version")]
    model = {"vocab": vocab, "merges": [pair for pair in pairs if pair]}
    return {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}


def _iter_special_tokens(token_settings: Mapping[str, Any]) -> Iterator[Any]:
    """The special tokens that a tokenizer's settings name."""
    for key, value in token_settings.items():
        if key.endswith("_token"):
            yield value
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from value.values() if isinstance(value, dict) else value or ()


def _token_text(token: Any) -> str | None:
    """A special token's text, written alone or with its settings."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _find_prefix_token(processor: Mapping[str, Any]) -> str | None:
    """The special token that a post-processor puts before a text."""
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_find_prefix_token, processor["processors"])), None)
    if "cls" in processor:  # RoBERTa's and BERT's
        return str(processor["cls"][0])
    first = (processor.get("single") or [{}])[0]
    name = first.get("SpecialToken", {}).get("id")
    return None if name is None else str(name)


def read_chat_template(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, or, as older folders have it, one of the
    tokenizer's settings, alone or as the default of several.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        if files.is_file(folder / CHAT_TEMPLATE):
            return files.read_small(folder / CHAT_TEMPLATE)
        if not files.is_file(folder / TOKENIZER_CONFIG_JSON):
            return None
        template = _read_optional_json(folder / TOKENIZER_CONFIG_JSON).get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the chat template in {folder} cannot be read: {error}", "restore it, or move it away."
        ) from error
    return template if isinstance(template, str) else None


def write_hf_tokenizer(
    folder: Path, tokenizer: Tokenizer, block_size: int, *, add_bos_token: bool
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        block_size: tokens in the model's context.
        add_bos_token: whether an end-of-text is put before each text.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.processors import TemplateProcessing

    hf_tokenizer = HFTokenizer.from_str(tokenizer.to_json())
    eos = end_of_text_token(tokenizer)
    if add_bos_token:
        hf_tokenizer.post_processor = TemplateProcessing(
            single=[eos, "$A"], special_tokens=[(eos, tokenizer.end_of_text)]
        )
    files.write_atomically(folder / TOKENIZER_JSON, hf_tokenizer.to_str())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_bos_token": add_bos_token,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would also give token types, which a GPT-2 adds to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if eos is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token"), eos)
    files.write_atomically(folder / TOKENIZER_CONFIG_JSON, json.dumps(settings, indent=2) + "\n")
