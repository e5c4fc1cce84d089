"""Fixtures for the data tests: a tokenizer and a file of documents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlxgpt.data import prepare_job, tokenize
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from tests.helpers.texts import LANGUAGES


@pytest.fixture(scope="session")
def small_bpe() -> BPETokenizer:
    """A BPE of many languages, with merges inside and across characters."""
    return bpe.train_bpe([LANGUAGES], 500)


@pytest.fixture
def documents_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of many documents that is prepared in many chunks."""
    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 200)
    monkeypatch.setattr(prepare_job, "SAVE_EVERY_CHUNKS", 3)
    rng = random.Random(1)
    words = ["one", "two\n", "three,", "Grüße", "🙂", "  ", "four hundred"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(150)]
    path = tmp_path / "many.txt"
    path.write_text(END_OF_TEXT.join(texts), encoding="utf-8")
    return path
