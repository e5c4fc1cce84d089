from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxgpt.config import ModelConfig
from mlxgpt.convert import gguf
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import END_OF_TEXT, Tokenizer
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params
from mlxgpt.utils.errors import UserError

TEXT = "to be or not to be\n"


def write_model(
    path: Path,
    tokenizer: Tokenizer,
    *,
    n_embd: int = 16,
    add_bos_token: bool = False,
    quantize: int | None = None,
) -> None:
    config = ModelConfig(
        n_layer=1,
        n_head=2,
        n_embd=n_embd,
        block_size=8,
        vocab_size=tokenizer.vocab_size,
        dropout=0.0,
        bias=False,
    )
    arrays = flatten_params(GPT(config).parameters())
    model = gguf.GGUFModel(config, arrays, tokenizer, "tiny", add_bos_token)
    gguf.write_gguf(path, model, quantize)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="package gguf") as error:
        write_model(tmp_path / "a.gguf", CharTokenizer(TEXT, end_of_text=False))
    assert "pip install 'gguf>=" in error.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("n_embd", "near"), [(144, "128 or 160"), (16, "32"), (33 * 16, "512 or 544")]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_are_not_whole_blocks_are_not_quantized(
    tmp_path: Path, n_embd: int, near: str, bits: int
) -> None:
    with pytest.raises(UserError, match=f"n_embd = {n_embd} cannot be quantized") as error:
        write_model(
            tmp_path / "a.gguf",
            CharTokenizer(TEXT, end_of_text=False),
            n_embd=n_embd,
            quantize=bits,
        )
    assert error.value.remedy.endswith(f"n_embd = {near}.")
    assert not list(tmp_path.iterdir())


def test_only_8_and_4_bits_are_supported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 bits"):
        write_model(
            tmp_path / "a.gguf", CharTokenizer(TEXT, end_of_text=False), n_embd=32, quantize=5
        )
    assert not list(tmp_path.iterdir())


def test_non_ascii_characters_require_an_end_of_text_token(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'é'"):
        write_model(tmp_path / "a.gguf", CharTokenizer("thé", end_of_text=False))
    assert not list(tmp_path.iterdir())


def test_bos_token_requires_an_end_of_text_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end-of-text"):
        write_model(
            tmp_path / "a.gguf", CharTokenizer("abc", end_of_text=False), add_bos_token=True
        )
    assert not list(tmp_path.iterdir())


class FullDiskWriter:
    """A GGUF writer that fails in the middle of the file."""

    def __init__(self, path: Path, arch: str) -> None:
        path.write_bytes(b"GGUF")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("write_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return lambda *_: None


def test_failed_write_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AnyMapping:
        def __getitem__(self, key: Any) -> tuple[int, int]:
            return 1, 4

    fake = SimpleNamespace(
        GGUFWriter=FullDiskWriter,
        LlamaFileType=AnyMapping(),
        GGMLQuantizationType=AnyMapping(),
        GGML_QUANT_SIZES=AnyMapping(),
    )
    monkeypatch.setitem(sys.modules, "gguf", fake)
    old = tmp_path / "a.gguf"
    old.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*a\.gguf: No space left"):
        write_model(old, CharTokenizer(TEXT, end_of_text=False))
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "old"


def test_bpe_has_a_token_for_each_id() -> None:
    tokenizer = bpe.train_bpe([TEXT * 3], 270)
    assert tokenizer.end_of_text
    kind, tokens, types, merges = gguf._make_vocabulary(tokenizer, tokenizer.vocab_size + 2)
    assert kind == "gpt2"
    letters = {letter: byte for byte, letter in bpe.bytes_to_unicode().items()}
    for id, token in enumerate(tokens[: tokenizer.end_of_text]):
        assert bytes(letters[letter] for letter in token) == tokenizer.token_bytes(id)
    assert tokens[tokenizer.end_of_text :] == [END_OF_TEXT, "[PAD0]", "[PAD1]"]
    assert types == [gguf.NORMAL] * tokenizer.end_of_text + [gguf.CONTROL] + [gguf.UNUSED] * 2
    pairs = [[letters[c] for c in pair.replace(" ", "")] for pair in merges]
    assert [bytes(pair) for pair in pairs] == [a + b for a, b in tokenizer.merges]


def test_byte_vocabulary_gets_one_unused_merge() -> None:
    assert gguf._make_vocabulary(BPETokenizer([]), 257).merges == ["Ā Ā"]
    assert bpe.bytes_to_unicode()[0] == "Ā"


def test_characters_are_user_defined_tokens() -> None:
    tokenizer = CharTokenizer("é\n漢", end_of_text=True)
    kind, tokens, types, _ = gguf._make_vocabulary(tokenizer, 6)
    assert kind == "gpt2"
    assert tokens == ["\n", "é", "漢", END_OF_TEXT, "[PAD0]", "[PAD1]"]
    assert types == [gguf.USER_DEFINED] * 3 + [gguf.CONTROL] + [gguf.UNUSED] * 2


def test_characters_without_an_end_of_text_are_byte_tokens() -> None:
    kind, tokens, types, _ = gguf._make_vocabulary(CharTokenizer("\n a\\", end_of_text=False), 6)
    assert kind == "rwkv"
    assert tokens == [r"\x0a", r"\x20", r"\x5c", r"\x61", r"\xff", r"\xff\xff"]
    assert types == [gguf.NORMAL] * 4 + [gguf.UNUSED] * 2


def test_ollama_modelfile() -> None:
    assert gguf.render_modelfile("tales.gguf", end_of_text=END_OF_TEXT) == (
        "FROM ./tales.gguf\n"
        'TEMPLATE "{{ .Prompt }}"\n'
        "PARAMETER temperature 0.8\n"
        'PARAMETER stop "<|endoftext|>"\n'
    )
    assert "stop" not in gguf.render_modelfile("shakespeare.gguf", end_of_text=None)
