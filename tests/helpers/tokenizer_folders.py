"""Tokenizers with added tokens, in each layout that transformers has used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mlxgpt.data.tokenizers.base import END_OF_TEXT
from tests.helpers.external_models import train_small_bpe

# Content and whether it is special; ids start at 280.
ADDED_TOKENS = [("<pad>", True), ("ACME", False), ("<|im_end|>", True), ("ACMEs", False)]
TOKENIZER_LAYOUTS = ["tokenizer.json", "added_tokens.json", "added_tokens_decoder", "both"]
TEXTS_WITH_ADDED_TOKENS = st.lists(
    st.sampled_from(
        [*(content for content, _ in ADDED_TOKENS), END_OF_TEXT, " ", "once ", "Ä", "\n"]
    )
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    max_size=8,
).map("".join)


def make_tokenizer_tree() -> dict[str, Any]:
    """Return a tokenizer.json as transformers writes it."""
    tree: dict[str, Any] = json.loads(train_small_bpe().to_json())
    tree["added_tokens"] += [
        {"id": id, "content": content, **make_token_flags(special)}
        for id, (content, special) in enumerate(ADDED_TOKENS, 280)
    ]
    return tree


def make_token_flags(special: bool) -> dict[str, bool]:
    false_flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {**false_flags, "normalized": not special, "special": special}


def write_folder(folder: Path, layout: str) -> None:
    """Write the files of a tokenizer in this layout and remove those of other layouts."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    tree = make_tokenizer_tree()

    def write(name: str, content: Any) -> None:
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 16}
    decoder = {
        str(id): {"content": content, **make_token_flags(special)}
        for id, (content, special) in enumerate([(END_OF_TEXT, True), *ADDED_TOKENS], 279)
    }
    if layout in ("tokenizer.json", "both"):
        write("tokenizer.json", tree)
    else:
        write("vocab.json", tree["model"]["vocab"])
        pairs = [" ".join(pair) for pair in tree["model"]["merges"]]
        lines = "\n".join(["#version: 0.2", *pairs, ""])
        (folder / "merges.txt").write_text(lines, encoding="utf-8")
    if layout in ("added_tokens_decoder", "both"):
        config["added_tokens_decoder"] = decoder
    if layout in ("added_tokens.json", "both"):
        write(
            "added_tokens.json", {content: id for id, (content, _) in enumerate(ADDED_TOKENS, 280)}
        )
        special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": {"content": END_OF_TEXT}}
        special |= {"sep_token": "<|im_end|>"}
        write("special_tokens_map.json", special)
    write("tokenizer_config.json", config)
