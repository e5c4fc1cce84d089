"""Documents -> ids, by threads: tiktoken lets them run at once. What comes out has the order of
what goes in, and memory stays bounded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from mlxgpt.data.meta import SPLITS, SplitMeta
from mlxgpt.data.splits import Part
from mlxgpt.data.tokenizers.char import NUL, Tokenizer

CHUNK = 1 << 20  # characters that one core encodes at a time

# For each split what a chunk adds to its array, and the counts of that.
Encoded = dict[str, tuple[bytes, SplitMeta]]


def encode(
    parts: Iterable[Part], tokenizer: Tokenizer, dtype: str, *, start: int = 0
) -> Generator[Encoded]:
    """The chunks of some documents, encoded, from number `start` on; to be closed if it is not read
    to its end.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chunks = islice(_chunks(parts), start, None)
    pending: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(cores)
    try:
        while True:
            for chunk in islice(chunks, 2 * (cores or 1) - len(pending)):
                pending.append(pool.submit(_encode, chunk, tokenizer, dtype))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _chunks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts together as long as one core should have at a time."""
    chunk: list[Part] = []
    size = 0
    for part in parts:
        chunk.append(part)
        size += len(part.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(chunk: list[Part], tokenizer: Tokenizer, dtype: str) -> Encoded:
    result = {}
    for split in SPLITS:
        mine = [part for part in chunk if part.split == split]
        number = sum(part.last for part in mine)
        end = NUL if tokenizer.end_of_text is not None else ""
        text = "".join(part.text + end if part.last else part.text for part in mine)
        ids = tokenizer.encode_stream(text)
        size = len(text.encode("utf-8")) - number * len(end)
        count = SplitMeta(len(ids), number, size, "")
        result[split] = (ids.astype(dtype).tobytes(), count)
    return result
