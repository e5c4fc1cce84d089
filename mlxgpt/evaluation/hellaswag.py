"""HellaSwag (Zellers et al., 2019): accuracy in choosing the most likely of four endings.

Scored as in build-nanogpt's hellaswag.py, where OpenAI's GPT-2 124M has an accuracy of 0.2859 by
summed loss and 0.2955 by mean loss. Does not depend on runs.
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

from mlxgpt.backend.execution import compile_function
from mlxgpt.data import formats, http
from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

VALIDATION_FILE = "hellaswag_val.jsonl"
NUM_ENDINGS = 4  # per example


@dataclass(frozen=True)
class HellaSwagExample:
    """A non-empty context, four endings, and the index of the correct ending."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class HellaSwagResult:
    """HellaSwag accuracy of a model. Random guessing has an accuracy of 0.25.

    Attributes:
        examples: number of examples.
        accuracy: share of examples whose correct ending has the lowest summed loss (`acc`).
        accuracy_error: standard error of `accuracy`.
        accuracy_norm: share whose correct ending has the lowest loss per token (`acc_norm`).
        accuracy_norm_error: standard error of `accuracy_norm`.
        cut: examples with a sequence longer than the context, truncated on the left.
    """

    examples: int
    accuracy: float
    accuracy_error: float
    accuracy_norm: float
    accuracy_norm_error: float
    cut: int


class ScoredExample(NamedTuple):
    """Losses of the endings of one example.

    Attributes:
        example_index: index into the examples.
        losses: float32 [4], nats, summed over the tokens of each ending.
        token_counts: int [4], tokens of each ending.
        truncated: whether a sequence was truncated to the context.
    """

    example_index: int
    losses: np.ndarray
    token_counts: np.ndarray
    truncated: bool


MAX_FILE_BYTES = 100_000_000  # of a user's file; HellaSwag's largest split has 47 million


def load_examples(path: Path | None = None) -> list[HellaSwagExample]:
    """Load examples from a file, or HellaSwag's validation split (10,042 examples; cached).

    Args:
        path: JSON lines with `ctx`, `endings` and `label`; default: the validation split.

    Raises:
        UserError: if the file cannot be downloaded or read, or has another format.
    """
    if path is None:
        return _parse_examples(_load_validation_file(), VALIDATION_FILE)
    try:
        content = _read_up_to(path, MAX_FILE_BYTES)
    except OSError as error:
        raise files.to_user_error(error, "read", path) from error
    formats.reject_unsupported_format(path, content[: formats.HEAD_BYTES])
    if len(content) > MAX_FILE_BYTES:
        raise UserError(
            f"{path} is larger than {MAX_FILE_BYTES:,} bytes",
            f"use a file in the format of {VALIDATION_FILE}.",
        )
    return _parse_examples(content, str(path))


def evaluate_hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[HellaSwagExample],
    *,
    bos: int | None = None,
    progress: Callable[[int, int, float], None] = lambda done, total, accuracy_norm: None,
) -> HellaSwagResult:
    """Evaluate a model's accuracy on HellaSwag.

    Args:
        bos: start token put before each context; None if the model does not use one.
        progress: called with (examples done, total, `accuracy_norm` so far); short examples first.

    Raises:
        UserError: if there are no examples, the tokenizer cannot encode them or has ids beyond the
            model's vocabulary, or losses are not finite.
    """
    correct = correct_norm = truncated = 0
    for done, scored in enumerate(ending_losses(model, tokenizer, examples, bos=bos), 1):
        label = examples[scored.example_index].label
        correct += int(scored.losses.argmin() == label)
        correct_norm += int((scored.losses / scored.token_counts).argmin() == label)
        truncated += scored.truncated
        progress(done, len(examples), correct_norm / done)
    n = len(examples)
    accuracy, norm = correct / n, correct_norm / n
    return HellaSwagResult(
        n, accuracy, _standard_error(accuracy, n), norm, _standard_error(norm, n), truncated
    )


BATCH_TOKENS = 2048  # approximate; their logits take 400 MB with GPT-2's vocabulary


def ending_losses(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[HellaSwagExample],
    *,
    bos: int | None = None,
) -> Iterator[ScoredExample]:
    """Yield the losses of each example's endings given the context. Examples are batched by length,
    so they come in another order.

    Context and ending (after a space) are encoded separately, and the loss is over the ending's
    tokens only. Sequences longer than the context length are truncated on the left.

    Raises:
        UserError: see `evaluate_hellaswag`.
    """
    _check_inputs(model, tokenizer, examples, bos)
    score = compile_function(lambda x, y, mask: (token_losses(model(x), y) * mask).sum(axis=1))
    buckets = _bucket_by_length(model.config.block_size, tokenizer, examples, bos)
    for length, bucket in buckets.items():
        batch_size = min(len(bucket), max(1, BATCH_TOKENS // (NUM_ENDINGS * length)))
        for start in range(0, len(bucket), batch_size):
            batch = bucket[start : start + batch_size]
            # The last batch is padded to the same shape, to avoid another compilation.
            arrays = _pad_batch(batch, batch_size, length)
            losses = np.array(score(*map(mx.array, arrays))).reshape(batch_size, NUM_ENDINGS)
            if not np.isfinite(losses).all():
                raise UserError(
                    "the model's losses are not finite (NaN or infinity)",
                    "its weights are damaged: use another checkpoint, or restore this one.",
                )
            for tokenized, example_losses in zip(batch, losses, strict=False):
                yield ScoredExample(
                    tokenized.example_index,
                    example_losses,
                    np.array(tokenized.token_counts),
                    tokenized.truncated,
                )


class _TokenizedExample(NamedTuple):
    """Ids of an example's context with each ending, and the number of scored tokens at the end."""

    example_index: int
    ids: list[list[int]]
    token_counts: list[int]
    truncated: bool


BUCKET_TOKENS = 32  # sequence lengths are padded to a multiple of this


def _bucket_by_length(
    block_size: int, tokenizer: Tokenizer, examples: Sequence[HellaSwagExample], bos: int | None
) -> dict[int, list[_TokenizedExample]]:
    """Tokenize the examples and group them by padded length, shortest first."""
    buckets = defaultdict(list)
    for example_index, example in enumerate(examples):
        tokenized = _tokenize_example(example_index, example, block_size, tokenizer, bos)
        input_length = max(map(len, tokenized.ids)) - 1
        padded_length = math.ceil(input_length / BUCKET_TOKENS) * BUCKET_TOKENS
        buckets[min(block_size, padded_length)].append(tokenized)
    return dict(sorted(buckets.items()))


def _tokenize_example(
    example_index: int,
    example: HellaSwagExample,
    block_size: int,
    tokenizer: Tokenizer,
    bos: int | None,
) -> _TokenizedExample:
    context = [*([] if bos is None else [bos]), *tokenizer.encode(example.context).tolist()]
    endings = [tokenizer.encode(" " + ending).tolist() for ending in example.endings]
    full_ids = [context + ending for ending in endings]
    # block_size + 1 ids fit, as the last one is only a target.
    ids = [sequence[-block_size - 1 :] for sequence in full_ids]
    token_counts = [
        min(len(ending_ids), len(clipped) - 1)
        for ending_ids, clipped in zip(endings, ids, strict=True)
    ]
    return _TokenizedExample(example_index, ids, token_counts, ids != full_ids)


def _pad_batch(
    examples: Sequence[_TokenizedExample], batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make (inputs, targets, mask), each [batch_size · 4, length], padded on the right."""
    inputs, targets = np.zeros((2, batch_size * NUM_ENDINGS, length), dtype=np.int32)
    mask = np.zeros((batch_size * NUM_ENDINGS, length), dtype=np.float32)
    rows = [
        row
        for tokenized in examples
        for row in zip(tokenized.ids, tokenized.token_counts, strict=True)
    ]
    for n, (ids, count) in enumerate(rows):
        end = len(ids) - 1
        inputs[n, :end], targets[n, :end] = ids[:-1], ids[1:]
        mask[n, end - count : end] = 1
    return inputs, targets, mask


def _check_inputs(
    model: GPT, tokenizer: Tokenizer, examples: Sequence[HellaSwagExample], bos: int | None
) -> None:
    """Raise UserError if there are no examples, or the tokenizer or model does not fit them."""
    if not examples:
        raise UserError(
            "there are no HellaSwag examples", "use a file that has examples, and a limit above 0."
        )
    model_vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > model_vocab_size or not 0 <= (bos or 0) < model_vocab_size:
        raise UserError(
            f"the tokenizer has ids beyond the model's vocabulary of {model_vocab_size:,}",
            "use the tokenizer that the model was trained with.",
        )
    if isinstance(tokenizer, CharTokenizer):
        texts = (text for example in examples for text in (example.context, *example.endings))
        try:
            tokenizer.encode("".join({" "}.union(*texts)))  # one call, to report all characters
        except UserError as error:
            raise UserError(
                f"HellaSwag has characters that this model's tokenizer lacks: {error.problem}",
                "evaluate a model with a byte-level BPE tokenizer, which can encode any text.",
            ) from error


def _standard_error(proportion: float, n: int) -> float:
    """Standard error of a proportion over n independent examples."""
    return math.sqrt(proportion * (1 - proportion) / n)


REPO = "rowanz/hellaswag"
VALIDATION_URL = f"https://raw.githubusercontent.com/{REPO}/master/data/{VALIDATION_FILE}"
VALIDATION_BYTES = 12_246_618  # 10,042 lines


def _load_validation_file() -> bytes:
    """Read the validation split from the cache, or download it.

    Raises:
        UserError: if the download fails.
    """
    with contextlib.suppress(OSError, ValueError, http.DownloadError):
        return _verify_sha256(
            _read_up_to(http.download_cache_folder(REPO) / VALIDATION_FILE, VALIDATION_BYTES)
        )
    host = urlsplit(VALIDATION_URL).hostname
    logger.info(f"downloading HellaSwag ({VALIDATION_BYTES / 1e6:.0f} MB) from {host}")
    try:
        content = _verify_sha256(http.download_bytes(VALIDATION_URL, max_bytes=VALIDATION_BYTES))
    except Exception as error:  # transports raise many types
        raise UserError(
            f"HellaSwag could not be downloaded ({host}: {http.describe_download_error(error)})",
            f"check the connection; or download {VALIDATION_FILE} yourself and pass its path.",
        ) from error
    try:
        files.write_atomically(
            http.download_cache_folder(REPO) / VALIDATION_FILE, content.decode("utf-8")
        )
    except (OSError, ValueError) as error:
        logger.warning(f"HellaSwag could not be cached ({http.describe_download_error(error)})")
    return content


VALIDATION_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def _verify_sha256(content: bytes) -> bytes:
    """Return `content` if it is the validation split, else raise DownloadError."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != VALIDATION_SHA256:
        raise http.DownloadError(f"unexpected content, sha256 {digest[:8]}…")
    return content


def _read_up_to(path: Path, max_bytes: int) -> bytes:
    """Read the first `max_bytes` + 1 bytes, the last of which shows that a file is too large."""
    with files.add_filename_to_errors(path), path.open("rb") as file:
        return file.read(max_bytes + 1)


def _parse_examples(content: bytes, name: str) -> list[HellaSwagExample]:
    """Parse JSON lines; raises UserError with the number of the first invalid line."""
    examples = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            examples.append(_parse_example(line, f"{name}, line {number:,}"))
    return examples


def _parse_example(line: bytes, location: str) -> HellaSwagExample:
    def format_error(problem: str) -> UserError:
        return UserError(
            f"{location} {problem}", f"use a file in the format of HellaSwag's {VALIDATION_FILE}."
        )

    try:
        row = json_files.parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise format_error("is not a JSON object") from error
    if not isinstance(row, dict):
        raise format_error("is not a JSON object")
    context, endings, label = (row.get(key) for key in ("ctx", "endings", "label"))
    if not isinstance(context, str) or not context:
        raise format_error("has no valid 'ctx': it must be a non-empty string")
    if not isinstance(endings, list) or [type(ending) for ending in endings] != [str] * NUM_ENDINGS:
        raise format_error(f"has no valid 'endings': it must be a list of {NUM_ENDINGS} strings")
    # The labels of the test split are not public.
    if type(label) is not int or label not in range(NUM_ENDINGS):
        raise format_error("has no valid 'label': it must be an integer from 0 to 3")
    return HellaSwagExample(normalize_text(context), tuple(map(normalize_text, endings)), label)
