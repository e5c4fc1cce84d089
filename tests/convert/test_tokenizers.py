"""Tokenizers of other tools, with every file that declares tokens, compared with `tokenizers`.
tests/oracle/test_oracle_tokenizers.py compares the same folders with transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace

import mlxgpt
from mlxgpt.convert import gguf, tokenizers
from mlxgpt.data.tokenizers import tokenizer_json
from mlxgpt.data.tokenizers.base import END_OF_TEXT, AddedToken, Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.external_models import train_small_bpe, write_gpt2_folder
from tests.helpers.tokenizer_folders import (
    ADDED_TOKENS,
    TEXTS_WITH_ADDED_TOKENS,
    TOKENIZER_LAYOUTS,
    make_tokenizer_tree,
    write_folder,
)


def round_trip(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    restored = tokenizer_json.load_tokenizer(path)
    assert restored.to_json() == tokenizer.to_json()
    assert restored.fingerprint == tokenizer.fingerprint
    assert restored.end_of_text == tokenizer.end_of_text
    return restored


def to_hugging_face(tokenizer: Tokenizer) -> HuggingFace:
    reference = HuggingFace.from_str(tokenizer.to_json())
    reference.encode_special_tokens = True  # encode them as text, as mlxgpt does
    return reference


def test_sorted_vocabularies_keep_their_fingerprints() -> None:
    fingerprints = {
        CharTokenizer("abc ", end_of_text=True).fingerprint[:16],
        CharTokenizer("abc ", end_of_text=False).fingerprint[:16],
        BPETokenizer([(b"a", b"b")]).fingerprint[:16],
    }
    assert fingerprints == {"988bf51a876d031d", "44fef91a2bd0574a", "b998e0a352588147"}
    in_order = CharTokenizer.from_ids({"a": 0, "b": 1})
    assert in_order.fingerprint == CharTokenizer("ba", end_of_text=False).fingerprint
    assert in_order.to_json() == CharTokenizer("ba", end_of_text=False).to_json()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_characters_keep_their_ids(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    letters = data.draw(st.permutations("abcÄ🙂\n t"))
    end = data.draw(st.sampled_from([None, 0, 4, 8]))
    free_ids = [n for n in range(len(letters) + (end is not None)) if n != end]
    ids = dict(zip(letters, free_ids, strict=True))
    added = [] if end is None else [AddedToken(end, "</s>")]
    tokenizer = CharTokenizer.from_ids(ids, added, end)
    text = data.draw(st.text(st.sampled_from(letters), max_size=30))
    expected = [ids[c] for c in text]
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(expected) == text
    assert to_hugging_face(tokenizer).encode(text).ids == expected
    restored = round_trip(tmp_path_factory.mktemp("t"), tokenizer)
    assert restored.encode(text).tolist() == expected
    if end is not None:
        stream = tokenizer.encode_documents(f"{text}\0{text}\0").tolist()
        assert stream == [*expected, end, *expected, end]
        assert tokenizer.decode([end]) == "</s>"
    with pytest.raises(UserError, match="does not know these characters: 'x' 'z'"):
        tokenizer.encode(text + "zx")


def test_fingerprint_depends_on_the_order_of_ids() -> None:
    orders = [{"a": 0, "b": 1}, {"a": 1, "b": 0}]
    assert len({CharTokenizer.from_ids(ids).fingerprint for ids in orders}) == 2
    with pytest.raises(ValueError, match="no token has id 1"):
        CharTokenizer.from_ids({"a": 0, "b": 2})
    with pytest.raises(ValueError, match="id 0 has two tokens"):
        CharTokenizer.from_ids({"a": 0, "b": 0})


def test_nanogpt_characters_in_another_order(tmp_path: Path) -> None:
    import pickle

    from mlxgpt.data import meta_pickle

    order = "the ca\n"
    meta = {
        "vocab_size": len(order),
        "itos": dict(enumerate(order)),
        "stoi": {c: n for n, c in enumerate(order)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = meta_pickle.load_char_tokenizer(tmp_path / "meta.pkl")
    assert tokenizer.encode("the cat").tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert tokenizer.characters == order


@pytest.mark.parametrize("form", TOKENIZER_LAYOUTS)
def test_added_tokens_are_the_same_in_every_layout(tmp_path: Path, form: str) -> None:
    write_folder(tmp_path, form)
    tokenizer, bos = tokenizers.read_hf_tokenizer(tmp_path, 1000)
    assert not bos
    assert tokenizer.vocab_size == 280 + len(ADDED_TOKENS)
    for id, (content, _) in enumerate(ADDED_TOKENS, 280):
        assert tokenizer.decode([id]) == content
    assert tokenizer.end_of_text == 279
    assert tokenizer.encode("<pad>").tolist() == train_small_bpe().encode("<pad>").tolist()
    assert tokenizer.encode("a cat ACME.").tolist() == [
        *train_small_bpe().encode("a cat ").tolist(),
        281,
        *train_small_bpe().encode(".").tolist(),
    ]
    round_trip(tmp_path, tokenizer)


@pytest.fixture(scope="module")
def added_tokenizer() -> Tokenizer:
    return tokenizer_json.build_tokenizer(make_tokenizer_tree())


@settings(max_examples=100, deadline=None)
@given(text=TEXTS_WITH_ADDED_TOKENS)
def test_encoding_with_added_tokens_matches_tokenizers(
    added_tokenizer: Tokenizer, text: str
) -> None:
    expected = to_hugging_face(added_tokenizer).encode(text).ids
    assert added_tokenizer.encode(text).tolist() == expected
    assert added_tokenizer.encode_documents(text).tolist() == expected
    assert added_tokenizer.decode(expected) == text


@settings(max_examples=50, deadline=None)
@given(text=TEXTS_WITH_ADDED_TOKENS, seed=st.integers(0, 3))
def test_bpe_with_ids_in_any_order_matches_tokenizers(text: str, seed: int) -> None:
    """For example, a tokenizer trained with its special tokens first."""
    tree = make_tokenizer_tree()
    names = list(tree["model"]["vocab"] | {t["content"]: 0 for t in tree["added_tokens"]})
    if seed:
        order = np.random.default_rng(seed).permutation(len(names)).tolist()
    else:
        order = [*range(len(ADDED_TOKENS) + 1, len(names)), *range(len(ADDED_TOKENS) + 1)]
    ids = dict(zip(names, order, strict=True))
    tree["model"]["vocab"] = ids
    for token in tree["added_tokens"]:
        token["id"] = ids[token["content"]]
    tokenizer = tokenizer_json.build_tokenizer(tree)
    reference = HuggingFace.from_str(json.dumps(tree))
    reference.encode_special_tokens = True
    expected = reference.encode(text).ids
    assert tokenizer.encode(text).tolist() == expected
    assert to_hugging_face(tokenizer).encode(text).ids == expected
    assert tokenizer.encode_documents(f"{text}\0").tolist() == [*expected, tokenizer.end_of_text]
    assert tokenizer.decode(expected) == text
    _, tokens, types, _ = gguf._make_vocabulary(tokenizer, tokenizer.vocab_size)
    assert [tokens[id] for id in expected] == reference.encode(text).tokens
    assert types[ids[END_OF_TEXT]] == gguf.CONTROL
    assert types[ids["ACME"]] == gguf.USER_DEFINED


def test_end_of_text_with_another_name(tmp_path: Path) -> None:
    tree = make_tokenizer_tree()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer, _ = tokenizers.read_hf_tokenizer(tmp_path, 1000)
    assert tokenizer.end_of_text == 282
    restored = round_trip(tmp_path, tokenizer)
    assert restored.encode_documents("a\0").tolist()[-1] == 282
    tokenizers.write_hf_tokenizer(tmp_path, restored, 16, add_bos_token=True)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["eos_token"] == written["bos_token"] == "<|im_end|>"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    reimported, bos = tokenizers.read_hf_tokenizer(tmp_path, 1000)
    assert bos
    assert reimported.fingerprint == tokenizer.fingerprint
    reference = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    assert reference.encode("a").ids == [282, *tokenizer.encode("a")]


def test_bpe_without_an_end_of_text(home: Path) -> None:
    tree = make_tokenizer_tree()
    del tree["model"]["vocab"][END_OF_TEXT]
    tree["added_tokens"] = [{"id": 279, "content": "<pad>", "special": True}]
    tokenizer = tokenizer_json.build_tokenizer(tree)
    assert tokenizer.end_of_text is None
    assert tokenizer.encode_documents("a\0").tolist() == tokenizer.encode("a\0").tolist()
    write_gpt2_folder(home / "m", tokenizer)
    mlxgpt.import_model("m")
    assert mlxgpt.generate(run="m", max_tokens=3, seed=1).tokens == 3
    with pytest.raises(UserError, match="byte-level BPE without an end-of-text token"):
        gguf._make_vocabulary(tokenizer, 280)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("added_tokens.json", {"<pad>": 281}, "two"),
        ("added_tokens.json", {"<new>": 290}, "no token has id 284"),
        ("added_tokens.json", {"a": 283}, "the token 'a' has two ids: 283"),
        ("added_tokens.json", ["<pad>"], "added_tokens.json is not a JSON object"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "a space before each text"),
        (
            "tokenizer_config.json",
            {"add_bos_token": True, "bos_token": "<pad>"},
            "texts start with '<pad>', but end with '<|endoftext|>'",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"283": {"content": "be", "single_word": True}}},
            "the added token 'be' has single_word",
        ),
    ],
)
@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens.json"])
def test_contradictory_files_are_refused(
    tmp_path: Path, form: str, name: str, content: Any, problem: str
) -> None:
    write_folder(tmp_path, form)
    path = tmp_path / name
    if form == name and isinstance(content, dict):
        content = json.loads(path.read_text()) | content
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        tokenizers.read_hf_tokenizer(tmp_path, 1000)
    assert problem in error.value.problem


def test_which_added_tokens_are_special(tmp_path: Path) -> None:
    write_folder(tmp_path, "added_tokens.json")
    names = {"additional_special_tokens": ["ACME"], "pad_token": {"content": "<pad>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer, _ = tokenizers.read_hf_tokenizer(tmp_path, 1000)
    special = {token.content for token in tokenizer.added_tokens.tokens if token.special}
    assert special == {END_OF_TEXT, "ACME", "<pad>"}


def test_special_tokens_outside_the_vocabulary_are_skipped(home: Path, notes: list[str]) -> None:
    write_gpt2_folder(home / "m")
    tree = json.loads((home / "m" / "tokenizer.json").read_text(encoding="utf-8"))
    tree["added_tokens"].append({"id": 280, "content": "[PAD]", "special": True})
    (home / "m" / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    run = mlxgpt.import_model("m")
    assert notes == ["skipped special tokens outside the model's vocabulary: [PAD]"]
    assert run.tokenizer.fingerprint == train_small_bpe().fingerprint


def test_windows_line_endings_and_byte_order_marks(tmp_path: Path) -> None:
    write_folder(tmp_path, "added_tokens.json")
    expected = tokenizers.read_hf_tokenizer(tmp_path, 1000)[0].fingerprint
    for path in tmp_path.iterdir():
        content = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content)
    assert tokenizers.read_hf_tokenizer(tmp_path, 1000)[0].fingerprint == expected
