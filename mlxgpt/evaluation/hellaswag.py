"""HellaSwag (Zellers et al., 2019): which of four endings a model finds likeliest, and how often
that is the right one. By this rule, build-nanogpt's (its hellaswag.py), GPT-2 124M as OpenAI
published it is right in 0.2859 of all cases, and in 0.2955 by the mean.

Knows a model, a tokenizer, and where the text lies; nothing of runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import mlx.core as mx
import numpy as np

from mlxgpt.backend.execution import compiled
from mlxgpt.data import formats, http
from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.char import CharTokenizer, Tokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

OWNER_AND_NAME, FILE = "rowanz/hellaswag", "hellaswag_val.jsonl"
URL = f"https://raw.githubusercontent.com/{OWNER_AND_NAME}/master/data/{FILE}"
BYTES = 12_246_618  # of 10,042 lines
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
LONGEST = 100_000_000  # bytes of somebody's own file; HellaSwag's largest has 47 million
ENDINGS = 4
BUCKET = 32  # sequences are padded to a multiple of so many tokens
AT_ONCE = 2048  # tokens, about: with GPT-2's vocabulary their logits take 400 MB


@dataclass(frozen=True)
class Example:
    """A context, which is not empty, its four endings, and which of them is the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Result:
    """How often a model chose the right ending. A guess is right in a quarter of all cases.

    Attributes:
        examples: how many there were.
        accuracy: share in which the right ending has the lowest summed loss (`acc`).
        accuracy_error: its standard error.
        accuracy_norm: share in which it has the lowest loss per token (`acc_norm`).
        accuracy_norm_error: its standard error.
        cut: examples of which a sequence was too long, and lost tokens of its beginning.
    """

    examples: int
    accuracy: float
    accuracy_error: float
    accuracy_norm: float
    accuracy_norm_error: float
    cut: int


class Scored(NamedTuple):
    """What the endings of one example cost.

    Attributes:
        number: which of the examples.
        sums: float32 [4], nats of each ending.
        counts: int [4], tokens that these are the sum over.
        cut: whether a sequence was too long.
    """

    number: int
    sums: np.ndarray
    counts: np.ndarray
    cut: bool


def load(path: Path | None = None) -> list[Example]:
    """HellaSwag's validation split, 10,042 examples, which stay in a cache; or those of a file.

    Args:
        path: a file of the same form: JSON lines with `ctx`, `endings` and `label`.

    Raises:
        UserError: if it could not be downloaded or read, or has another form.
    """
    if path is None:
        return _parsed(_validation(), FILE)
    try:
        content = _read(path, LONGEST)
    except OSError as error:
        raise files.os_error(error, "read", path) from error
    formats.refuse_other(path, content[: formats.HEAD])
    if len(content) > LONGEST:
        raise UserError(
            f"{path} is longer than {LONGEST:,} bytes", f"give a file of the form of {FILE}."
        )
    return _parsed(content, str(path))


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    bos: int | None = None,
    progress: Callable[[int, int, float], None] = lambda done, total, accuracy_norm: None,
) -> Result:
    """How often a model finds the right ending the likeliest.

    Args:
        bos: an id that is put before each context, where a model's texts begin with one.
        progress: is told of (examples done, all, `accuracy_norm` so far); short ones come first.

    Raises:
        UserError: if there are no examples, the tokenizer cannot read them, it gives ids that the
            model has no room for, or the model's losses are no numbers.
    """
    right = right_norm = cut = 0
    for done, one in enumerate(ending_losses(model, tokenizer, examples, bos=bos), 1):
        label = examples[one.number].label
        right += int(one.sums.argmin() == label)
        right_norm += int((one.sums / one.counts).argmin() == label)
        cut += one.cut
        progress(done, len(examples), right_norm / done)
    n = len(examples)
    accuracy, norm = right / n, right_norm / n
    return Result(n, accuracy, _error(accuracy, n), norm, _error(norm, n), cut)


def ending_losses(
    model: GPT, tokenizer: Tokenizer, examples: Sequence[Example], *, bos: int | None = None
) -> Iterator[Scored]:
    """The loss of each ending after its context, over the ending's tokens alone; examples of like
    length come together, each once.

    Ids are those of the context, then those of a space and the ending, encoded apart. The model
    reads no more than the block: of a longer sequence the beginning is left out.

    Raises:
        UserError: as `evaluate`.
    """
    _must_fit(model, tokenizer, examples, bos)
    score = compiled(lambda x, y, mask: (token_losses(model(x), y) * mask).sum(axis=1))
    for length, sequences in _buckets(model.config.block_size, tokenizer, examples, bos).items():
        size = min(len(sequences), max(1, AT_ONCE // (ENDINGS * length)))
        for start in range(0, len(sequences), size):
            some = sequences[start : start + size]
            # One shape for each bucket: where the last batch is not full, rows are all padding.
            batch = _padded(some, size, length)
            sums = np.array(score(*map(mx.array, batch))).reshape(size, ENDINGS)
            if not np.isfinite(sums).all():
                raise UserError(
                    "the model's losses are no numbers", "its weights are damaged: get them again."
                )
            for one, of_one in zip(some, sums, strict=False):
                yield Scored(one.number, of_one, np.array(one.counts), one.cut)


class _Sequences(NamedTuple):
    """The ids of an example's context with each ending, and how many of the last are predicted."""

    number: int
    ids: list[list[int]]
    counts: list[int]
    cut: bool


def _buckets(
    block_size: int, tokenizer: Tokenizer, examples: Sequence[Example], bos: int | None
) -> dict[int, list[_Sequences]]:
    """The examples by their padded length, the shortest first."""
    buckets = defaultdict(list)
    for number, example in enumerate(examples):
        one = _sequences(number, example, block_size, tokenizer, bos)
        inputs = max(map(len, one.ids)) - 1
        buckets[min(block_size, math.ceil(inputs / BUCKET) * BUCKET)].append(one)
    return dict(sorted(buckets.items()))


def _sequences(
    number: int, example: Example, block_size: int, tokenizer: Tokenizer, bos: int | None
) -> _Sequences:
    context = [*([] if bos is None else [bos]), *tokenizer.encode(example.context).tolist()]
    endings = [tokenizer.encode(" " + ending).tolist() for ending in example.endings]
    whole = [context + ending for ending in endings]
    # The last id is only predicted, so that one more than the block fits.
    ids = [one[-block_size - 1 :] for one in whole]
    counts = [min(len(e), len(kept) - 1) for e, kept in zip(endings, ids, strict=True)]
    return _Sequences(number, ids, counts, ids != whole)


def _padded(
    some: Sequence[_Sequences], size: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs, targets, mask), each [size · 4, length]; padding stands at the end, where nothing
    before it looks.
    """
    inputs, targets = np.zeros((2, size * ENDINGS, length), dtype=np.int32)
    mask = np.zeros((size * ENDINGS, length), dtype=np.float32)
    rows = [row for one in some for row in zip(one.ids, one.counts, strict=True)]
    for n, (ids, count) in enumerate(rows):
        end = len(ids) - 1
        inputs[n, :end], targets[n, :end] = ids[:-1], ids[1:]
        mask[n, end - count : end] = 1
    return inputs, targets, mask


def _must_fit(
    model: GPT, tokenizer: Tokenizer, examples: Sequence[Example], bos: int | None
) -> None:
    """Refuse what would give no figure, or a wrong one."""
    if not examples:
        raise UserError(
            "there are no examples of HellaSwag", "give a file that has some, and a limit above 0."
        )
    room = model.config.vocab_size
    if tokenizer.vocab_size > room or not 0 <= (bos or 0) < room:
        raise UserError(
            f"the tokenizer gives ids beyond the model's vocabulary of {room:,}",
            "use the tokenizer that the model was trained with.",
        )
    if isinstance(tokenizer, CharTokenizer):
        texts = (text for one in examples for text in (one.context, *one.endings))
        try:
            tokenizer.encode("".join({" "}.union(*texts)))  # all at once, so that all are named
        except UserError as error:
            raise UserError(
                f"HellaSwag has characters that this model has not: {error.problem}",
                "evaluate a model with a byte-level BPE, which reads any text.",
            ) from error


def _error(share: float, n: int) -> float:
    """Standard error of a share of n independent cases."""
    return math.sqrt(share * (1 - share) / n)


def _validation() -> bytes:
    """The validation split's file, from the cache or from where it is published.

    Raises:
        UserError: if it could not be downloaded.
    """
    with contextlib.suppress(OSError, ValueError, http.Trouble):
        return _checked(_read(http.cache_folder(OWNER_AND_NAME) / FILE, BYTES))
    host = urlsplit(URL).hostname
    logger.info(f"getting HellaSwag ({BYTES / 1e6:.0f} MB) from {host}")
    try:
        content = _checked(http.fetch(URL, longest=BYTES))
    except Exception as error:  # whatever the transport raises
        raise UserError(
            f"HellaSwag could not be downloaded ({host}: {http.reason(error)})",
            f"check the connection; or get {FILE} some other way, and name that file.",
        ) from error
    try:
        files.write_atomically(http.cache_folder(OWNER_AND_NAME) / FILE, content.decode("utf-8"))
    except (OSError, ValueError) as error:
        logger.warning(f"HellaSwag cannot be kept for the next time ({http.reason(error)})")
    return content


def _checked(content: bytes) -> bytes:
    """`content` itself, if it is the validation split."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise http.Trouble(f"another text, sha256 {digest[:8]}…")
    return content


def _read(path: Path, longest: int) -> bytes:
    """A file; of one that is longer, a byte more than that."""
    with files.naming(path), path.open("rb") as file:
        return file.read(longest + 1)


def _parsed(content: bytes, name: str) -> list[Example]:
    """The examples of JSON lines; raises UserError naming the first line that is none."""
    examples = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            examples.append(_example(line, f"{name}, line {number:,}"))
    return examples


def _example(line: bytes, where: str) -> Example:
    def refuse(what: str) -> UserError:
        return UserError(f"{where} {what}", f"give a file of the form of HellaSwag's {FILE}.")

    try:
        row = files.parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise refuse("is not a JSON object") from error
    if not isinstance(row, dict):
        raise refuse("is not a JSON object")
    context, endings, label = (row.get(key) for key in ("ctx", "endings", "label"))
    if not isinstance(context, str) or not context:
        raise refuse("has no text as its 'ctx'")
    if not isinstance(endings, list) or [type(one) for one in endings] != [str] * ENDINGS:
        raise refuse(f"has not {ENDINGS} texts as its 'endings'")
    if type(label) is not int or label not in range(ENDINGS):  # those of the test split are secret
        raise refuse("has no number from 0 to 3 as its 'label'")
    return Example(normalize_text(context), tuple(map(normalize_text, endings)), label)
