"""Tokenizers that tests of texts share, and real texts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from mlxgpt.corpus import bpe
from mlxgpt.corpus.bpe import BPETokenizer
from tests.corpus.texts import LANGUAGES

# Other work on the same machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def real_texts() -> Path:
    """The folder of real texts that MLXGPT_TEXTS names."""
    folder = os.environ.get("MLXGPT_TEXTS")
    if not folder:
        pytest.skip("MLXGPT_TEXTS names no folder of real texts")
    return Path(folder)


@pytest.fixture(scope="session")
def gpt2(real_texts: Path) -> BPETokenizer:
    """GPT-2's own encoding; from here on `bpe.gpt2()` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(real_texts / "tiktoken-cache"))
        return bpe.gpt2()


@pytest.fixture(scope="session")
def small_bpe() -> BPETokenizer:
    """A BPE of many languages, with merges inside of characters and across them."""
    return bpe.train([LANGUAGES], 500)
