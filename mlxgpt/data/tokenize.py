"""Encode documents in parallel threads, in order and with bounded memory (tiktoken releases the
GIL).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from mlxgpt.data.meta import SPLITS, SplitMeta
from mlxgpt.data.splits import SplitPiece
from mlxgpt.data.tokenizers.base import NUL, Tokenizer

# split -> (bytes to append to its array, their counts)
EncodedChunk = dict[str, tuple[bytes, SplitMeta]]


def encode_pieces(
    pieces: Iterable[SplitPiece], tokenizer: Tokenizer, dtype: str, *, start: int = 0
) -> Generator[EncodedChunk]:
    """Encode documents and yield the encoded chunks in order, from chunk `start` on. Close the
    generator if you do not exhaust it.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chunks = islice(_group_into_chunks(pieces), start, None)
    pending: deque[Future[EncodedChunk]] = deque()
    pool = ThreadPoolExecutor(n_cores)
    try:
        while True:
            for chunk in islice(chunks, 2 * (n_cores or 1) - len(pending)):
                pending.append(pool.submit(_encode_chunk, chunk, tokenizer, dtype))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


CHUNK_CHARS = 1 << 20  # characters that one thread encodes at a time


def _group_into_chunks(pieces: Iterable[SplitPiece]) -> Iterator[list[SplitPiece]]:
    """Group consecutive pieces into chunks of at least `CHUNK_CHARS` characters."""
    chunk: list[SplitPiece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(chunk: list[SplitPiece], tokenizer: Tokenizer, dtype: str) -> EncodedChunk:
    result = {}
    for split in SPLITS:
        split_pieces = [piece for piece in chunk if piece.split == split]
        n_documents = sum(piece.last for piece in split_pieces)
        separator = "" if tokenizer.end_of_text is None else NUL
        text = "".join(
            piece.text + separator if piece.last else piece.text for piece in split_pieces
        )
        ids = tokenizer.encode_documents(text)
        size = len(text.encode("utf-8")) - n_documents * len(separator)
        count = SplitMeta(len(ids), n_documents, size, "")
        result[split] = (ids.astype(dtype).tobytes(), count)
    return result
