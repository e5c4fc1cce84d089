from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data.tokenizers import bpe, bpe_trainer
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import LANGUAGES, remove_nul, texts


@pytest.fixture(scope="session")
def hf_tokenizer(small_bpe: BPETokenizer) -> Any:
    """The small BPE, as Hugging Face's library reads its tokenizer.json."""
    return to_hf_tokenizer(small_bpe)


@pytest.fixture(scope="session")
def hf_gpt2(gpt2: BPETokenizer) -> Any:
    return to_hf_tokenizer(gpt2)


@pytest.fixture(scope="session")
def tiktoken_gpt2(gpt2: BPETokenizer) -> Any:
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def to_hf_tokenizer(tokenizer: BPETokenizer) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.to_json())


def iter_all_code_points() -> Iterator[str]:
    """Each one once, between letters, in strings of 100,000."""
    codes = [n for n in range(sys.maxunicode + 1) if not 0xD800 <= n < 0xE000]
    for start in range(0, len(codes), 100_000):
        yield "".join(f"a{chr(code)}" for code in codes[start : start + 100_000])


@given(texts)
def test_its_file_gives_others_the_same_ids(
    small_bpe: BPETokenizer, hf_tokenizer: Any, text: str
) -> None:
    assert small_bpe.encode(text).tolist() == hf_tokenizer.encode(text).ids


@given(texts)
def test_gpt2_ids_are_those_of_tiktoken_and_hugging_face(
    gpt2: BPETokenizer, tiktoken_gpt2: Any, hf_gpt2: Any, text: str
) -> None:
    ids = gpt2.encode(text).tolist()
    assert ids == tiktoken_gpt2.encode_ordinary(text) == hf_gpt2.encode(text).ids
    assert gpt2.decode(ids) == text


def test_every_code_point_has_the_same_ids_everywhere(
    small_bpe: BPETokenizer, hf_tokenizer: Any
) -> None:
    for text in iter_all_code_points():
        (hf_encoding,) = hf_tokenizer.encode_batch_fast([text])
        assert np.array_equal(small_bpe.encode(text), hf_encoding.ids)


@given(st.text("ab ", min_size=1, max_size=60), st.integers(257, 300))
def test_whatever_it_was_trained_on_its_file_agrees(text: str, vocab_size: int) -> None:
    merges = bpe_trainer.learn_merges([text], vocab_size - 1)
    tokenizer = BPETokenizer.from_json_merges(merges)
    assert 257 <= tokenizer.vocab_size <= vocab_size
    hf_copy = to_hf_tokenizer(tokenizer)
    assert hf_copy.get_vocab_size() == tokenizer.vocab_size
    for sample in (text, text[::-1], "aaaaaaa abababa bbb"):
        assert tokenizer.encode(sample).tolist() == hf_copy.encode(sample).ids


@given(texts)
def test_a_text_comes_back_as_it_was(small_bpe: BPETokenizer, text: str) -> None:
    ids = small_bpe.encode(text)
    assert small_bpe.decode(ids) == text
    assert b"".join(map(small_bpe.token_bytes, ids)) == text.encode()


def test_special_text_is_text(small_bpe: BPETokenizer) -> None:
    text = f"one{END_OF_TEXT} two\0"
    ids = small_bpe.encode(text)
    assert small_bpe.end_of_text not in ids
    assert small_bpe.decode(ids) == text
    assert small_bpe.end_of_text not in small_bpe.encode_documents(text.replace("\0", ""))
    assert small_bpe.end_of_text
    assert small_bpe.decode([small_bpe.end_of_text]) == END_OF_TEXT
    assert to_hf_tokenizer(small_bpe).encode(f"{END_OF_TEXT}").ids == [small_bpe.end_of_text]


@given(st.lists(st.one_of(texts, st.just(END_OF_TEXT)).map(remove_nul), min_size=1, max_size=5))
def test_a_stream_is_its_documents_with_an_end_after_each(
    small_bpe: BPETokenizer, documents: list[str]
) -> None:
    expected = [i for text in documents for i in [*small_bpe.encode(text), small_bpe.end_of_text]]
    actual = small_bpe.encode_documents("".join(f"{text}\0" for text in documents))
    assert actual.tolist() == expected


def test_a_vocabulary_is_bytes_then_merges_then_the_end(small_bpe: BPETokenizer) -> None:
    tokens = [small_bpe.token_bytes(n) for n in range(small_bpe.vocab_size)]
    assert sorted(tokens[:256]) == [bytes([n]) for n in range(256)]
    assert tokens[256:-1] == [left + right for left, right in small_bpe.merges]
    assert tokens[-1] == END_OF_TEXT.encode()
    assert small_bpe.end_of_text == small_bpe.vocab_size - 1 == 499
    for n, (left, right) in enumerate(small_bpe.merges):
        assert {left, right} <= set(tokens[: 256 + n]), "each is made of tokens before it"


def test_half_a_character_is_shown_as_such(small_bpe: BPETokenizer) -> None:
    first = small_bpe.tokens.index("é".encode()[:1])
    assert small_bpe.decode([first]) == "\ufffd"


def test_the_most_frequent_pair_is_merged_first() -> None:
    tokenizer = bpe.train_bpe(["the cat the dog the"], 259)
    assert tokenizer.merges[0] in [(b"h", b"e"), (b"t", b"h")]
    assert tokenizer.tokens[257] == b"the"


def test_training_twice_gives_the_same(small_bpe: BPETokenizer) -> None:
    first = bpe.train_bpe(iter(LANGUAGES.splitlines(keepends=True)), 500)
    second = bpe.train_bpe(iter(LANGUAGES.splitlines(keepends=True)), 500)
    assert first.fingerprint == second.fingerprint
    assert first.to_json() == second.to_json()
    assert bpe.train_bpe([LANGUAGES], 500).fingerprint == small_bpe.fingerprint
    assert bpe.train_bpe([LANGUAGES], 499).fingerprint != small_bpe.fingerprint


@pytest.mark.parametrize("vocab_size", [256, 1, 0, -5])
def test_a_vocabulary_without_room_for_every_byte_is_refused(vocab_size: int) -> None:
    with pytest.raises(UserError, match="too small for byte-level BPE") as excinfo:
        bpe.train_bpe(["some text"], vocab_size)
    assert "257" in excinfo.value.remedy


def test_a_text_may_give_fewer_merges() -> None:
    tokenizer = bpe.train_bpe(["abc abc"], 10_000)
    assert tokenizer.tokens[-1] in (b" abc", b"abc")
    assert tokenizer.vocab_size < 265
    assert bpe.train_bpe([], 300).vocab_size == 257


def test_an_error_while_it_learns_is_that_error() -> None:
    def texts() -> Iterator[str]:
        yield "one"
        raise UserError("the file has gone", "bring it back.")

    with pytest.raises(UserError, match="the file has gone"):
        bpe.train_bpe(texts(), 300)


def test_words_give_the_vocabulary_of_a_trainer_that_cuts_nothing() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel
    hf_bpe = Tokenizer(models.BPE())
    hf_bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=499, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    hf_bpe.train_from_iterator([LANGUAGES], trainer)
    expected = json.loads(hf_bpe.to_str())["model"]["merges"]
    assert bpe_trainer.learn_merges([LANGUAGES], 499) == expected
    assert len(expected) > 200


LETTERS = "".join(random.Random(0).choices("etaoin", k=20_000))


@pytest.mark.parametrize("run", [LETTERS, "中文" * 9000, " " * 9000, "1" * 9000, "-" * 9000])
def test_what_is_learned_from_has_bounded_length_and_is_the_whole_text(run: str) -> None:
    """The trainer's time grows with the square of that length."""
    text = f"To be, or not: {run} that is"
    pieces = [piece for piece, _ in bpe_trainer.make_pre_tokenizer().pre_tokenize_str(text)]
    assert max(map(len, pieces)) == bpe_trainer.MAX_RUN_BYTES
    letter_to_byte = {letter: byte for byte, letter in bpe.bytes_to_unicode().items()}
    assert bytes(letter_to_byte[letter] for letter in "".join(pieces)) == text.encode()


@pytest.mark.parametrize("run", [LETTERS, "中文" * 9000, " " * 9000, "1" * 9000])
def test_a_long_run_is_encoded_as_others_do_and_comes_back(run: str) -> None:
    tokenizer = bpe.train_bpe([run], 300)
    ids = tokenizer.encode(run)
    assert ids.tolist() == to_hf_tokenizer(tokenizer).encode(run).ids
    assert tokenizer.encode_documents(run).tolist() == ids.tolist()
    assert tokenizer.decode(ids) == run


def write_trainer_script(path: Path, monkeypatch: pytest.MonkeyPatch, after_reading: str) -> None:
    """Another program in the trainer's place, which writes its process id to a file."""
    path.write_text(
        "import os, pathlib, signal, sys, time\n"
        "pathlib.Path(__file__).with_suffix('.pid').write_text(str(os.getpid()))\n"
        "while sys.stdin.readline() not in ('null\\n', ''): pass\n" + after_reading
    )
    monkeypatch.setattr(bpe, "TRAINER_SCRIPT", path)


def test_ctrl_c_ends_the_training_and_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "trainer.py"
    ctrl_c = "os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    write_trainer_script(program, monkeypatch, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        bpe.train_bpe(["some text"], 300)
    with pytest.raises(ProcessLookupError):
        os.kill(int(program.with_suffix(".pid").read_text()), 0)


@pytest.mark.parametrize("while_reading", [True, False])
def test_a_process_that_fails_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_reading: bool
) -> None:
    write_trainer_script(tmp_path / "trainer.py", monkeypatch, "sys.exit(3)")
    if while_reading:
        (tmp_path / "trainer.py").write_text("raise SystemExit(3)")
    texts = ["some text" * 10_000] * 100
    with pytest.raises(UserError, match="its process exited with code 3"):
        bpe.train_bpe(texts, 300)


@pytest.mark.parametrize("text", [json.dumps("half a text"), json.dumps(LETTERS * 300) + "\nnull"])
def test_the_training_process_ends_with_its_parent(text: str) -> None:
    """Before it has all texts, and in the middle of training."""
    command = [sys.executable, str(bpe.TRAINER_SCRIPT), "50000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        output, _ = trainer.communicate(text.encode() + b"\n")
    assert (trainer.returncode, output) == (1, b"")


def test_gpt2_is_gpt2(gpt2: BPETokenizer, tiktoken_gpt2: Any) -> None:
    assert gpt2.vocab_size == tiktoken_gpt2.n_vocab == bpe.GPT2_VOCAB_SIZE
    assert gpt2.end_of_text == tiktoken_gpt2.eot_token
    for n in range(gpt2.vocab_size):
        assert gpt2.token_bytes(n) == tiktoken_gpt2.decode_single_token_bytes(n)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_gpt2_merges_are_those_that_were_published(gpt2: BPETokenizer, real_texts: Path) -> None:
    # tiktoken's first file is OpenAI's vocab.bpe: a line on the version, then a merge in each.
    merges_file = (
        real_texts / "tiktoken-cache" / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    ).read_text(encoding="utf-8")
    expected = [tuple(line.split()) for line in merges_file.splitlines()[1:]]
    letters = bpe.bytes_to_unicode()
    actual = [tuple("".join(letters[b] for b in side) for side in pair) for pair in gpt2.merges]
    assert len(expected) == 50_000
    assert actual == expected


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    bpe.load_gpt2_tokenizer.cache_clear()
    yield
    bpe.load_gpt2_tokenizer.cache_clear()


@pytest.mark.usefixtures("nothing_cached")
def test_gpt2_that_cannot_be_fetched_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    with pytest.raises(UserError, match="could not be downloaded: ConnectionError") as excinfo:
        bpe.load_gpt2_tokenizer()
    assert "--tokenizer bpe" in excinfo.value.remedy


@pytest.mark.usefixtures("nothing_cached")
def test_a_silent_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = threading.Event()
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: finished.wait(10))
    monkeypatch.setattr(bpe, "GPT2_DOWNLOAD_TIMEOUT_SECONDS", 0.05)
    try:
        with pytest.raises(UserError) as excinfo:
            bpe.load_gpt2_tokenizer()
        assert excinfo.value.problem == "the GPT-2 tokenizer could not be downloaded"
    finally:
        finished.set()


def test_the_order_of_merges_is_part_of_the_identity() -> None:
    merges = [(b"a", b"b"), (b"c", b"d")]
    assert BPETokenizer(merges).fingerprint != BPETokenizer(merges[::-1]).fingerprint
