"""Unicode test texts, and helpers to read documents back from readers and token arrays."""

from __future__ import annotations

import io
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import strategies as st

from mlxgpt.data import readers
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.tokenizers.base import END_OF_TEXT, Tokenizer

LANGUAGES = """
The rain in Spain falls mainly in the plain; we'll see 1,234 of them, don't you think?
    def rain(plain):\n\t\treturn 'in Spain'\r\n\n\n\r\n\r\n
        with        runs      of     white      space:\t\t\t\tof        four kinds
Schöne Grüße aus Österreich, naïve café, Ærøskøbing, Dvořák, Łódź. e\u0301 e\u0301
Съешь ещё этих мягких булок. Ξεσκεπάζω την ψυχοφθόρα. שלום עולם, مرحبا بالعالم ٣٤٥
すもももももももものうち 我能吞下玻璃而不伤身体 हिन्दी में १२३ ภาษาไทย 한국어
👩‍👩‍👧 👩‍👩‍👧 🙂🙂🙂 🇩🇪🇩🇪 👍🏽 — … « » “ ” \u00a0\u2003\u3000 ½ Ⅷ ₂
"""

WHITESPACE = " \n\r\t\v\f\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u202f\u3000"
UNUSUAL_TEXT = """don't we'll I'VE 's 'S 👩‍👩‍👧 🇩🇪 👍🏽 e\u0301 שלום مرحبا ٣٤ 日本語
\ufeff \u200b \u200d ﷺ ǅ ß"""
text_parts = [
    st.text(max_size=6),
    st.text(WHITESPACE, min_size=1, max_size=5),
    st.builds(operator.mul, st.sampled_from([" ", "\n", "\t", "\r\n"]), st.integers(1, 30)),
    st.text("0123456789٣१½", min_size=1, max_size=5),
    st.text("ab '!", min_size=1, max_size=8),
    st.sampled_from(LANGUAGES.split()),
    st.sampled_from(UNUSUAL_TEXT.split()),
]
texts = (
    st.lists(st.one_of(text_parts), max_size=12).map("".join).filter(lambda t: END_OF_TEXT not in t)
)


def remove_nul(text: str) -> str:
    return text.replace("\0", "")


def read_like_python(text: str) -> str:
    """Decode as Python reads a text file: line endings become newlines, no byte-order mark."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8-sig", newline=None).read()


@contextmanager
def limit_piece_chars(length: int) -> Iterator[None]:
    """Limit the length of document pieces, and of words accordingly, within this context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_PIECE_CHARS", length)
        patch.setattr(readers, "MAX_WORD_CHARS", 4 * length)
        yield


def join_pieces(pieces: Iterable[DocumentPiece]) -> list[str]:
    """Join pieces into whole documents."""
    documents, document = [], ""
    for text, is_last in pieces:
        document += text
        if is_last:
            documents.append(document)
            document = ""
    assert not document, "the last document has ended"
    return documents


def decode_documents(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Decode a token array that has an end-of-text after each document."""
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    *document_ids, trailing_ids = np.split(ids, ends + 1)
    assert not len(trailing_ids), "the last document has ended"
    return [tokenizer.decode(ids_of_document[:-1]) for ids_of_document in document_ids]


def decode_splits(dataset: Dataset) -> tuple[list[str], list[str]]:
    """Return the training and the validation documents."""
    tokenizer = dataset.tokenizer
    return (
        decode_documents(dataset.train.ids, tokenizer),
        decode_documents(dataset.val.ids, tokenizer),
    )
