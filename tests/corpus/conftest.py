"""A tokenizer that tests of texts share."""

from __future__ import annotations

import pytest

from mlxgpt.corpus import bpe
from mlxgpt.corpus.bpe import BPETokenizer
from tests.corpus.texts import LANGUAGES


@pytest.fixture(scope="session")
def small_bpe() -> BPETokenizer:
    """A BPE of many languages, with merges inside of characters and across them."""
    return bpe.train([LANGUAGES], 500)
