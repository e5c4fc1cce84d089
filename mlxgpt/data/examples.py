"""Encoded examples to fine-tune on, of which only the answers are trained.

Lists of messages are rendered with a chat template; strings are concatenated, and end-of-text is
appended, as in TRL.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxgpt.config import DataConfig
from mlxgpt.data import sources
from mlxgpt.data.chat_template import encode_marked, render_marked
from mlxgpt.data.example_array import EXAMPLE_DTYPE, pack_examples
from mlxgpt.data.example_rows import ExampleRow, read_examples
from mlxgpt.data.meta import EXAMPLES_FORMAT_VERSION, SPLITS, DatasetMeta, SplitMeta
from mlxgpt.data.normalize import normalize_unicode
from mlxgpt.data.tokenizers.base import Tokenizer, byte_lengths
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExampleFormat:
    """How examples are encoded.

    Attributes:
        template: Jinja chat template; None: prompts and completions are strings.
        template_strings: whether strings are rendered with it, too, as messages of user and
            assistant.
        last_only: whether only the last answer of a conversation is trained.
        max_tokens: length at which examples are cut.
    """

    template: str | None
    template_strings: bool
    last_only: bool
    max_tokens: int


class Example(NamedTuple):
    """An encoded example: ids [n], and which of them are trained, bool [n]."""

    ids: np.ndarray
    trained: np.ndarray


def encode_example(row: ExampleRow, format: ExampleFormat, tokenizer: Tokenizer) -> Example:
    """Encode an example, without cutting it.

    Raises:
        UserError: if it has no answer, or cannot be encoded, with its location.
    """
    try:
        if row.is_text and not format.template_strings:
            prompt, completion = (message["content"] for message in row.messages)
            return _encode_strings(prompt, completion, tokenizer)
        segments = _render_segments(row, format, tokenizer)
        return _join([(encode_marked(text, tokenizer), trained) for text, trained in segments])
    except UserError as error:
        raise UserError(f"{row.location}: {error.problem}", error.remedy) from error


def _join(parts: Sequence[tuple[Sequence[int], bool]]) -> Example:
    """Join ids, and whether they are trained, to an example."""
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part, _ in parts])
    return Example(ids, np.concatenate([np.full(len(part), trained) for part, trained in parts]))


def _encode_strings(prompt: str, completion: str, tokenizer: Tokenizer) -> Example:
    """Encode each string on its own, as a prompt is when the model is used."""
    end = tokenizer.end_of_text
    if end is None:
        raise UserError(
            "the model has no end-of-text token, so it cannot learn where an answer ends",
            "fine-tune a model that was trained on several documents.",
        )
    prompt, completion = (normalize_unicode(text, tokenizer) for text in (prompt, completion))
    return _join(
        [
            ([end], False),  # begins every text
            (tokenizer.encode(prompt).tolist(), False),
            (tokenizer.encode(completion).tolist(), True),
            ([end], True),
        ]
    )


def _render_segments(
    row: ExampleRow, format: ExampleFormat, tokenizer: Tokenizer
) -> list[tuple[str, bool]]:
    """Render a conversation as segments of text, and whether each is trained: what the template
    adds for an answer, after the prompt for it.
    """
    assert format.template is not None
    turns = [
        n
        for n, message in enumerate(row.messages)
        if message["role"] == "assistant" and n >= row.prompt_length
    ]
    if not turns:
        raise UserError(
            "there is no message of the assistant to train on",
            'add one: {"role": "assistant", "content": "…"}',
        )
    # What follows the last answer would be neither read nor trained.
    messages = row.messages[: turns[-1] + 1]

    def render(end: int, *, add_generation_prompt: bool) -> str:
        return render_marked(
            format.template or "",
            messages[:end],
            tokenizer,
            add_generation_prompt=add_generation_prompt,
        )

    text = render(len(messages), add_generation_prompt=False)
    segments: list[tuple[str, bool]] = []
    position = 0
    for turn in turns[-1:] if format.last_only else turns:
        prompt = render(turn, add_generation_prompt=True)
        through_answer = render(turn + 1, add_generation_prompt=False)
        if not (through_answer.startswith(prompt) and text.startswith(through_answer)):
            raise UserError(
                "the chat template does not render an answer after the prompt for it",
                "use --mask last, or split the conversation.",
            )
        segments += [(prompt[position:], False), (through_answer[len(prompt) :], True)]
        position = len(through_answer)
    return segments


VAL_EVERY = 10  # without validation data, one in this many examples is for validation


def prepare_examples(
    data: DataConfig, format: ExampleFormat, tokenizer: Tokenizer, data_dir: Path
) -> Path:
    """Encode examples into a data folder, or find the one that has them.

    Returns:
        the folder; its name has a hash of the examples, the tokenizer and the format

    Raises:
        UserError: if an example is not valid, or there are too few.
    """
    try:
        train, val = list(read_examples(data.source)), list(read_examples(data.val_source))
    except OSError as error:
        raise files.to_user_error(error, "read", Path(data.source[0])) from error
    keys = [row.key for row in (*train, *val)]
    identity = json.dumps([keys, len(train), asdict(format), tokenizer.fingerprint])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    folder = data_dir / f"{sources.data_folder_name(data.source)}-examples-{digest[:8]}"
    if files.exists(folder / "meta.json"):
        return folder
    logger.info(f"preparing {', '.join(data.source)} in {folder}")
    if not val:
        train, val = _split(train)
    val_keys = {row.key for row in val}
    train = [row for row in train if row.key not in val_keys]
    if not train or not val:
        raise UserError(
            f"{', '.join(data.source)} has too few different examples",
            "use at least two, or other ones for --val-source.",
        )
    encoded = {
        split: _encode_all(rows, format, tokenizer)
        for split, rows in zip(SPLITS, (train, val), strict=True)
    }
    cut = sum(n_cut for _, n_cut in encoded.values())
    origin = {
        "files": [Path(name).name for name in data.source],
        "examples": {**asdict(format), "sha256": digest, "cut": cut, "pairs": train[0].is_pair},
    }
    examples = {split: split_examples for split, (split_examples, _) in encoded.items()}
    with files.file_lock(folder, "preparing"):
        if not files.exists(folder / "meta.json"):  # prepared by another process meanwhile
            _write_folder(folder, examples, origin, tokenizer)
    return folder


def _split(rows: Sequence[ExampleRow]) -> tuple[list[ExampleRow], list[ExampleRow]]:
    """Split examples by their contents, so that equal ones are in the same split."""
    keys = sorted({row.key for row in rows})
    val_keys = set(keys[: max(1, len(keys) // VAL_EVERY)])
    train = [row for row in rows if row.key not in val_keys]
    return train, [row for row in rows if row.key in val_keys]


def _encode_all(
    rows: Sequence[ExampleRow], format: ExampleFormat, tokenizer: Tokenizer
) -> tuple[list[Example], int]:
    """Encode and cut examples, of a pair two; also returns how many were cut."""
    examples: list[Example] = []
    n_cut = 0
    for row in rows:
        for answer in row.answers():
            example = encode_example(answer, format, tokenizer)
            if len(example.ids) > format.max_tokens:
                example = Example(*(part[: format.max_tokens] for part in example))
                n_cut += 1
            if not example.trained[1:].any():  # the first token is never predicted
                raise _cut_error(row, "no token to train on", format)
            examples.append(example)
        if row.is_pair and np.array_equal(examples[-1].ids, examples[-2].ids):
            raise _cut_error(row, "the same chosen and rejected answer", format)
    return examples, n_cut


def _cut_error(row: ExampleRow, problem: str, format: ExampleFormat) -> UserError:
    """The error for an example of which too little is left."""
    return UserError(
        f"{row.location} has {problem} within {format.max_tokens - 1:,} tokens",
        "shorten its prompt, omit that line, or use a larger --block-size.",
    )


def _write_folder(
    folder: Path,
    examples: Mapping[str, Sequence[Example]],
    origin: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    split_metas = {}
    for split, split_examples in examples.items():
        content = pack_examples(split_examples).tobytes()
        ids = np.concatenate([example.ids for example in split_examples])
        size = int(byte_lengths(tokenizer)[ids].sum())
        sha256 = hashlib.sha256(content).hexdigest()
        split_metas[split] = SplitMeta(len(ids), len(split_examples), size, sha256)
        (scratch / f"{split}.bin").write_bytes(content)
    meta = DatasetMeta(
        EXAMPLES_FORMAT_VERSION,
        EXAMPLE_DTYPE,
        tokenizer.vocab_size,
        tokenizer.fingerprint,
        dict(origin),
        **split_metas,
    )
    (scratch / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (scratch / "meta.json").write_text(meta.to_json(), encoding="utf-8")
    for path in scratch.iterdir():
        files.fsync_path(path)
    files.publish_folder(scratch, folder)
