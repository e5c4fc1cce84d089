from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data.tokenizers import bpe, tokenizer_json
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import remove_nul, texts


@given(st.text(min_size=1))
def test_a_text_comes_back_as_it_was(text: str) -> None:
    tokenizer = CharTokenizer(text, end_of_text=True)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(st.text(min_size=1), st.booleans())
def test_the_file_gives_the_same_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, text: str, end_of_text: bool
) -> None:
    tokenizer = CharTokenizer(text, end_of_text=end_of_text)
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = tokenizer_json.load_tokenizer(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size == len(set(text)) + end_of_text
    assert (loaded.encode(text) == tokenizer.encode(text)).all()


def test_ids_are_in_code_point_order_in_every_process() -> None:
    code = (
        "from mlxgpt.data.tokenizers.char import CharTokenizer as T;"
        "t = T(set('hello wörld'), end_of_text=False); print(t.characters, t.fingerprint)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert outputs.pop().startswith(" dehlorwö ")


def test_unknown_characters_are_named() -> None:
    tokenizer = CharTokenizer("abc", end_of_text=False)
    with pytest.raises(UserError, match="does not know these characters: 'x' 'é' '🙂'"):
        tokenizer.encode("a🙂éxbx")
    with pytest.raises(UserError, match="does not know these characters"):
        tokenizer.encode("\udcff")  # what a terminal gives for bytes that are no UTF-8


def test_special_text_is_text() -> None:
    tokenizer = CharTokenizer("<|endoftext|>", end_of_text=True)
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == b"<|endoftext|>"


def test_the_fingerprint_tells_vocabularies_apart() -> None:
    fingerprints = {
        CharTokenizer("abc", end_of_text=False).fingerprint,
        CharTokenizer("abc", end_of_text=True).fingerprint,
        CharTokenizer("abd", end_of_text=False).fingerprint,
    }
    assert len(fingerprints) == 3
    shuffled = CharTokenizer("cbacba", end_of_text=False)
    assert shuffled.fingerprint == CharTokenizer("abc", end_of_text=False).fingerprint


def test_nothing_is_no_vocabulary() -> None:
    with pytest.raises(UserError, match="the text is empty"):
        CharTokenizer("", end_of_text=True)


@pytest.mark.parametrize("change", ["ids", "merges", "text", "gone", "list"])
def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "tokenizer.json"
    tree = json.loads(CharTokenizer("abc", end_of_text=True).to_json())
    if change == "ids":
        tree["model"]["vocab"] = {"a": 2, "b": 1, "c": 0}
    if change == "merges":
        tree["model"]["merges"] = [["a", "b"]]
    content = {"text": "{", "list": "[]"}.get(change, json.dumps(tree))
    if change != "gone":
        path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer_json.load_tokenizer(path)


@given(st.lists(st.one_of(texts, st.just(END_OF_TEXT)).map(remove_nul), min_size=1))
def test_a_stream_is_its_documents_with_an_end_after_each(documents: list[str]) -> None:
    tokenizer = CharTokenizer("".join(documents) + "x", end_of_text=True)
    expected = [i for text in documents for i in [*tokenizer.encode(text), tokenizer.end_of_text]]
    actual = tokenizer.encode_documents("".join(f"{text}\0" for text in documents))
    assert actual.tolist() == expected


@given(texts)
def test_hugging_face_reads_the_same_ids(text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = CharTokenizer(text + "x", end_of_text=True)
    hf_tokenizer = Tokenizer.from_str(tokenizer.to_json())
    assert hf_tokenizer.encode(text).ids == tokenizer.encode(text).tolist()
    assert hf_tokenizer.encode(f"x{END_OF_TEXT}").ids[1:] == [tokenizer.end_of_text]
    assert hf_tokenizer.decode([len(tokenizer.characters)]) == "", (
        "a special token, left out of texts"
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def round_trips(path: Path, tokenizer: BPETokenizer) -> bool:
    loaded = tokenizer_json.load_tokenizer(write(path, tokenizer.to_json()))
    return (
        isinstance(loaded, BPETokenizer)
        and loaded.fingerprint == tokenizer.fingerprint
        and loaded.tokens == tokenizer.tokens
        and loaded.to_json() == tokenizer.to_json()
    )


def test_the_file_of_a_bpe_gives_the_same_bpe(tmp_path: Path, small_bpe: BPETokenizer) -> None:
    assert round_trips(tmp_path / "tokenizer.json", small_bpe)
    assert round_trips(tmp_path / "tokenizer.json", bpe.train_bpe([], 257)), "without any merge"


def test_the_file_of_gpt2_gives_gpt2(tmp_path: Path, gpt2: BPETokenizer) -> None:
    assert round_trips(tmp_path / "tokenizer.json", gpt2)


def test_a_bpe_of_other_merges_or_of_another_order_is_another(small_bpe: BPETokenizer) -> None:
    merges = small_bpe.merges
    variants = [merges[:-1], [*merges[:-2], merges[-1], merges[-2]], []]
    fingerprints = {BPETokenizer(variant).fingerprint for variant in (merges, *variants)}
    chars = CharTokenizer("abc", end_of_text=True)
    assert len(fingerprints | {chars.fingerprint}) == 5


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("model", "merges"), [["a", "b"]]),
        (("model", "merges"), [["a", "b"], ["a", "b"]]),
        (("model", "merges"), [["a"]]),
        (("model", "merges"), [["a", "語"]]),
        (("model", "merges"), None),
        (("model", "vocab"), {"a": 0}),
        (("model", "type"), "WordPiece"),
        (("model", "byte_fallback"), True),
        (("model",), None),
        (("added_tokens",), []),
        (("normalizer",), {"type": "Lowercase"}),
        (("pre_tokenizer",), None),
        (("pre_tokenizer",), {"type": "Whitespace"}),
        (("decoder",), None),
    ],
)
def test_a_bpe_that_is_not_ours_is_refused(
    tmp_path: Path, small_bpe: BPETokenizer, where: tuple[str, ...], value: object
) -> None:
    tree = json.loads(small_bpe.to_json())
    inner = tree
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path = write(tmp_path / "tokenizer.json", json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer\.json is not an mlxgpt tokenizer"):
        tokenizer_json.load_tokenizer(path)
