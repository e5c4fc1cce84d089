"""A tokenizer as Hugging Face keeps it: tokenizer.json, or GPT-2's vocab.json and merges.txt; and
ours as these are read by transformers, mlx-lm and `tokenizers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from mlxgpt import files
from mlxgpt.corpus import tokenizer_file
from mlxgpt.corpus.bpe import BPETokenizer
from mlxgpt.corpus.tokenizer import END_OF_TEXT, CharTokenizer, Tokenizer
from mlxgpt.errors import UserError
from mlxgpt.storage.run import CHAT_TEMPLATE

Known = TypeVar("Known", BPETokenizer, CharTokenizer)

JSON, SETTINGS = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"


def read(folder: Path) -> tuple[Tokenizer, bool]:
    """A folder's tokenizer, and whether texts begin with an end-of-text.

    Raises:
        UserError: if there is none, or it is of a kind that is not built here.
    """
    try:
        if (folder / JSON).is_file():
            text = files.read_small(folder / JSON, tokenizer_file.LARGEST)
            with files.not_too_deep():
                tree = files.parse_json(text)
                tokenizer = _of_json(tree)
        else:
            tokenizer, tree = _of_two_files(folder), {}
        return tokenizer, _adds_bos(folder, tree) and tokenizer.end_of_text is not None
    except OSError as error:
        raise UserError(
            f"{folder} has no {JSON}: {error.strerror}", "copy or download the whole folder again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the tokenizer in {folder} is none that is known here: {error}",
            "take a model with GPT-2's own, or one that mlxgpt exported.",
        ) from error


def _of_json(tree: Any) -> Tokenizer:
    model = tree["model"]
    if model.get("type", "BPE") != "BPE" or tree.get("normalizer"):
        raise ValueError("it is no plain BPE")
    added = {token["content"]: token["id"] for token in tree.get("added_tokens", [])}
    if not tree.get("pre_tokenizer") and not model["merges"]:  # characters, as we write them
        characters = CharTokenizer(
            (text for text in model["vocab"] if text not in added), end_of_text=bool(added)
        )
        return _checked(characters, model["vocab"] | added)
    cut = tree["pre_tokenizer"] or {}
    if cut.get("type") != "ByteLevel" or cut.get("add_prefix_space") or not cut.get("use_regex", 1):
        raise ValueError("it does not cut texts as GPT-2 does")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return _checked(BPETokenizer.from_json_merges(merges), model["vocab"] | added)


def _of_two_files(folder: Path) -> Tokenizer:
    vocab = files.parse_json(files.read_small(folder / VOCAB, tokenizer_file.LARGEST))
    lines = files.read_small(folder / MERGES, tokenizer_file.LARGEST).split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return _checked(BPETokenizer.from_json_merges(pairs), vocab)


def _checked(tokenizer: Known, vocab: dict[str, int]) -> Known:
    """`tokenizer` itself, if each token has the id that it has there."""
    tree = json.loads(tokenizer.to_json())
    ours = tree["model"]["vocab"] | {
        token["content"]: token["id"] for token in tree["added_tokens"]
    }
    if vocab != ours:
        token = min(dict(vocab.items() ^ ours.items()), default="")
        raise ValueError(f"the token {token!r} does not have the id that it has in ours")
    return tokenizer


def _adds_bos(folder: Path, tree: Any) -> bool:
    settings = folder / SETTINGS
    if settings.is_file():
        told = files.parse_json(files.read_small(settings)).get("add_bos_token")
        if told is not None:
            return told is True
    processor = tree.get("post_processor") or {}
    first = (processor.get("single") or [{}])[0]
    return first.get("SpecialToken", {}).get("id") == END_OF_TEXT


def chat_template(folder: Path) -> str | None:
    """A folder's chat template: a file of its own, or, as older folders have it, one of the
    tokenizer's settings, alone or as the default of several.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        if (folder / CHAT_TEMPLATE).is_file():
            return files.read_small(folder / CHAT_TEMPLATE)
        if not (folder / SETTINGS).is_file():
            return None
        told = files.parse_json(files.read_small(folder / SETTINGS)).get("chat_template")
        if isinstance(told, list):
            told = {one["name"]: one["template"] for one in told}.get("default")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the chat template in {folder} cannot be read: {error}", "restore it, or delete it."
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
    if add_bos_token:
        special = [(END_OF_TEXT, tokenizer.end_of_text)]
        written.post_processor = TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=special
        )
    (folder / JSON).write_text(written.to_str(), encoding="utf-8")
    tree: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_bos_token": add_bos_token,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_of_text is not None:
        tree |= dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    (folder / SETTINGS).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
