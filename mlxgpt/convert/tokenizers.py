"""Import and export of tokenizers in the Hugging Face format.

Reads tokenizer.json, or GPT-2's vocab.json and merges.txt, plus the added tokens in
added_tokens.json and tokenizer_config.json. Writes tokenizer.json and tokenizer_config.json, for
transformers, mlx-lm and `tokenizers`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.data.chat_template import CHAT_TEMPLATE
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.base import END_OF_TEXT, Tokenizer, end_of_text_token
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

TOKENIZER_JSON, TOKENIZER_CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
VOCAB_JSON, MERGES_TXT = "vocab.json", "merges.txt"
ADDED_TOKENS_JSON, SPECIAL_TOKENS_JSON = "added_tokens.json", "special_tokens_map.json"


def read_hf_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, bool]:
    """Read a folder's tokenizer, and whether it puts an end-of-text token before each text.

    Args:
        vocab_size: the model's vocabulary size. Special tokens with ids beyond it, such as an
            untrained padding token, are logged and skipped.

    Raises:
        UserError: if there is no tokenizer, or it is not supported.
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
            tree = json_files.read_json(folder / TOKENIZER_JSON, tokenizer_json.MAX_TOKENIZER_BYTES)
        else:
            tree = _read_vocab_and_merges(folder)
        if settings.get("add_prefix_space"):
            raise ValueError("it adds a space before each text (add_prefix_space)")
        # In the order of transformers: later entries override earlier ones.
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
    """Read a JSON object from a file; empty if the file does not exist."""
    tree = (
        json_files.read_json(path, tokenizer_json.MAX_TOKENIZER_BYTES)
        if files.is_file(path)
        else {}
    )
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return tree


def _read_vocab_and_merges(folder: Path) -> dict[str, Any]:
    """Read GPT-2's vocab.json and merges.txt as the content of a tokenizer.json."""
    vocab = json_files.read_json(folder / VOCAB_JSON, tokenizer_json.MAX_TOKENIZER_BYTES)
    merges = files.read_small(folder / MERGES_TXT, tokenizer_json.MAX_TOKENIZER_BYTES)
    lines = merges.removeprefix("\ufeff").splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#version")]
    model = {"vocab": vocab, "merges": [pair for pair in pairs if pair]}
    return {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}


def _iter_special_tokens(token_settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the special tokens in a tokenizer's settings."""
    for key, value in token_settings.items():
        if key.endswith("_token"):
            yield value
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from value.values() if isinstance(value, dict) else value or ()


def _token_text(token: Any) -> str | None:
    """Text of a special token, stored as a string or as an object with a `content` field."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _find_prefix_token(processor: Mapping[str, Any]) -> str | None:
    """The special token that a post-processor prepends to each text, or None."""
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_find_prefix_token, processor["processors"])), None)
    if "cls" in processor:  # RoBERTa and BERT
        return str(processor["cls"][0])
    first = (processor.get("single") or [{}])[0]
    name = first.get("SpecialToken", {}).get("id")
    return None if name is None else str(name)


def read_chat_template(folder: Path) -> str | None:
    """Read a folder's chat template, or None. It is in a separate file; older folders have it in
    tokenizer_config.json, as a string or as the entry `default` of a list.

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
        block_size: context length in tokens.
        add_bos_token: whether an end-of-text token is put before each text.
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
        # Else transformers 4 also returns token_type_ids, which its GPT-2 embeds and adds.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if eos is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token"), eos)
    files.write_atomically(folder / TOKENIZER_CONFIG_JSON, json.dumps(settings, indent=2) + "\n")
