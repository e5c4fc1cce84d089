from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mlxgpt.data import tokenize
from mlxgpt.data.splits import SplitPiece
from mlxgpt.data.tokenize import encode_pieces
from mlxgpt.data.tokenizers.char import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijÄ", end_of_text=True)
PIECES = [
    SplitPiece(
        "val" if n % 7 == 0 else "train", "abcdefghijÄ"[n % 11] * (1 + n % 5), last=n % 3 > 0
    )
    for n in range(400)
]


class BlockingTokenizer(CharTokenizer):
    """Blocks in `encode_documents` until `proceed` is set."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER.characters, end_of_text=True)
        self.started, self.proceed, self.finished = (threading.Event() for _ in range(3))

    def encode_documents(self, text: str) -> np.ndarray:
        self.started.set()
        self.proceed.wait(60)
        self.finished.set()
        return super().encode_documents(text)


def test_interruption_does_not_wait_for_chunks_being_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = BlockingTokenizer()

    def interrupted_pieces() -> Iterator[SplitPiece]:
        yield PIECES[1]
        tokenizer.started.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 1)
    with pytest.raises(KeyboardInterrupt):
        next(encode_pieces(interrupted_pieces(), tokenizer, "<u2"))
    assert not tokenizer.finished.is_set(), "the chunk is still being encoded"
    tokenizer.proceed.set()


@pytest.mark.parametrize("start", [0, 5])
def test_chunks_are_ordered_and_counted(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 20)
    chunks = list(encode_pieces(PIECES, TOKENIZER, "<u2", start=start))
    assert len(chunks) > 20
    if start:
        assert chunks == list(encode_pieces(PIECES, TOKENIZER, "<u2"))[start:]
        return
    for split in ("train", "val"):
        split_pieces = [piece for piece in PIECES if piece.split == split]
        text = "".join(piece.text + "\0" * piece.last for piece in split_pieces)
        ids = np.frombuffer(b"".join(chunk[split][0] for chunk in chunks), "<u2")
        assert ids.tolist() == TOKENIZER.encode_documents(text).tolist()
        counts = [chunk[split][1] for chunk in chunks]
        assert sum(count.tokens for count in counts) == len(ids)
        assert sum(count.documents for count in counts) == sum(piece.last for piece in split_pieces)
        size = len(text.replace("\0", "").encode())
        assert sum(count.bytes for count in counts) == size, "ends are no text"
