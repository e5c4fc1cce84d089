"""Split documents into training and validation data: scan a source to choose the split and build
its tokenizer, then assign each document.

The split depends only on the documents' content, so that duplicates are in the same split and no
validation document is trained on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from mlxgpt.data import readers
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.sources import Source
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.utils.errors import UserError

VAL_FRACTION = 0.1  # of a document whose end is for validation
BPE_SAMPLE_CHARS = 20_000_000  # maximum number of characters to train a BPE on


class SplitPiece(NamedTuple):
    """A document, or a piece of one, assigned to a split."""

    split: str
    text: str
    last: bool


@dataclass(frozen=True)
class SplitRule:
    """Which documents of a source, or which parts of them, are for validation.

    Attributes:
        single: whether the source is a single document, whose end is for validation.
        cut: where the validation part of a single document starts, in characters.
        every: one in this many documents is for validation.
        chosen: key of one more document for validation.
        tails: whether the end of each document is for validation, instead of whole documents.
    """

    single: bool
    cut: int = 0
    every: int = 0
    chosen: str = ""
    tails: bool = False

    def is_validation(self, key: str) -> bool:
        """Whether the document with this key is for validation."""
        return key == self.chosen or (self.every > 0 and int(key, 16) % self.every == 0)


class _SourceScanner:
    """Reads the training text once, to count it and to sample text for training a BPE."""

    def __init__(self, source: Source, rule: SplitRule, val_keys: set[str]) -> None:
        self.source, self.rule, self.val_keys = source, rule, val_keys
        self.documents = self.val_documents = self.dropped_documents = 0
        self.first_document_chars = 0
        self.total_bytes = self.val_bytes = 0
        self.min_key, self.min_key_count = "", 0  # smallest key, and how many documents have it
        self.min_key_bytes = 0
        self.characters: set[str] = set()

    def scan(
        self, *, collect_characters: bool, collect_sample: bool, progress: Callable[[int], None]
    ) -> Iterator[str]:
        """Yield text to train a BPE on. Reads the text as far as the split and the flags need."""
        stride = max(1, self.source.size // BPE_SAMPLE_CHARS)
        chars_read = chars_sampled = 0
        key, is_training = "", True
        is_first = True
        pieces = drop_blank_documents(self.source.train, single=self.source.single)
        for n, (text, last) in enumerate(pieces):
            if is_first:
                key = _document_key(text)
                is_training = self._count_document(key)
            is_first = last
            if self.documents == 1:
                self.first_document_chars += len(text)
            self._count_bytes(key, text)
            if collect_characters:
                self.characters.update(text)
            chars_read += len(text)
            progress(chars_read)
            if is_training and n % stride == 0 and chars_sampled < BPE_SAMPLE_CHARS:
                chars_sampled += len(text)
                yield text
            is_sample_complete = not collect_sample or (
                self.source.is_homogeneous and chars_sampled >= BPE_SAMPLE_CHARS
            )
            if is_sample_complete and not collect_characters and self._is_split_decided():
                return

    def _is_split_decided(self) -> bool:
        """Whether reading more cannot change which documents are for validation."""
        if self.source.val is not None:
            return self.documents > max(1, self.dropped_documents)
        return self.source.is_homogeneous and 0 < self.val_documents < self.documents

    @property
    def val_fraction(self) -> float:
        """Fraction of bytes that are for validation if no document is split."""
        return (self.val_bytes or self.min_key_bytes) / max(1, self.total_bytes)

    def _count_bytes(self, key: str, text: str) -> None:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        self.total_bytes += size
        self.val_bytes += size * self.rule.is_validation(key)
        self.min_key_bytes += size * (key == self.min_key)

    def _count_document(self, key: str) -> bool:
        """Count a document; return whether it is for training."""
        self.documents += 1
        if not self.min_key or key < self.min_key:
            self.min_key, self.min_key_count, self.min_key_bytes = key, 0, 0
        self.min_key_count += key == self.min_key
        is_val, is_dropped = self.rule.is_validation(key), key in self.val_keys
        self.val_documents += is_val
        self.dropped_documents += is_dropped
        return not is_val and not is_dropped


VAL_EVERY = 100  # 1 in 100 documents is for validation
MAX_VAL_BYTES = 20_000_000  # target maximum, since mlxgpt eval reads the whole split
MAX_VAL_FRACTION = 0.15  # of all bytes in whole documents; above it, each document is split


def scan_source(
    source: Source, tokenizer_kind: str, progress: Callable[[int], None]
) -> tuple[SplitRule, Tokenizer | None]:
    """Scan a source to choose the split and build its tokenizer (None for an existing one, such as
    `gpt2`).

    Args:
        tokenizer_kind: `char`, `gpt2`, or `bpe` with the vocabulary size, such as `bpe4096`.
        progress: called with the number of characters read.

    Raises:
        UserError: if the text cannot be trained on.
    """
    is_char, is_bpe = tokenizer_kind == "char", tokenizer_kind.startswith("bpe")
    every = max(VAL_EVERY, source.size // MAX_VAL_BYTES) if source.val is None else 0
    rule = SplitRule(source.single, every=every)
    val_keys: set[str] = set()
    characters: set[str] = set()
    val_documents = 0
    for text, first, _ in _iter_pieces(source.val or (), source.single):
        val_documents += first
        if first:
            val_keys.add(_document_key(text))
        if is_char:
            characters.update(text)
    scanner = _SourceScanner(source, rule, val_keys)
    stream = scanner.scan(collect_characters=is_char, collect_sample=is_bpe, progress=progress)
    tokenizer: Tokenizer | None = bpe.train_bpe(stream, int(tokenizer_kind[3:])) if is_bpe else None
    deque(stream, maxlen=0)
    if not scanner.documents or (source.val is not None and not val_documents):
        names = ", ".join(source.origin.get("files", [source.name]))
        raise UserError(f"no text found in {names}", "use files that are not empty.")
    if source.val is not None:
        if scanner.dropped_documents == scanner.documents:
            raise UserError(
                "every training document is also in the validation data",
                "use different data for --source and --val-source.",
            )
        if scanner.documents == val_documents == 1:
            rule = SplitRule(single=True)
    elif scanner.documents == 1:
        rule = SplitRule(single=True, cut=int(scanner.first_document_chars * (1 - VAL_FRACTION)))
    else:
        if not scanner.val_documents:
            rule = SplitRule(single=False, every=every, chosen=scanner.min_key)
        if scanner.documents in (scanner.val_documents, scanner.min_key_count):
            raise UserError(
                "all documents are identical, so none can be held out for validation",
                "use data with different documents, or --val-source.",
            )
        if scanner.val_fraction > MAX_VAL_FRACTION:
            rule = SplitRule(single=False, tails=True)
            if is_bpe:
                tokenizer = bpe.train_bpe(_sample_train_text(source, rule), int(tokenizer_kind[3:]))
    if is_char:
        characters |= scanner.characters
        if len(characters) < 2:
            raise UserError(
                f"the data consists only of the character {next(iter(characters), '')!r}",
                "use text with at least two different characters.",
            )
        # Characters that occur only in the validation text need ids, too.
        tokenizer = CharTokenizer(characters, end_of_text=not rule.single)
    return rule, tokenizer


def assign_splits(source: Source, rule: SplitRule) -> Iterator[SplitPiece]:
    """Yield the documents of a source with their split; no document is in both splits."""
    val_keys: set[str] = set()
    for text, first, last in _iter_pieces(source.val or (), rule.single):
        if first:
            val_keys.add(_document_key(text))
        yield SplitPiece("val", text, last)
    if rule.cut:
        yield from _split_at_lengths(_iter_pieces(source.train, single=True), iter([rule.cut]))
        return
    if rule.tails:
        yield from _split_at_lengths(
            _iter_pieces(source.train, single=False), _train_lengths(source)
        )
        return
    split = "train"
    for text, first, last in _iter_pieces(source.train, rule.single):
        if first:
            key = _document_key(text)
            split = "val" if rule.is_validation(key) else "" if key in val_keys else "train"
        if split:
            yield SplitPiece(split, text, last)


def _split_at_lengths(
    pieces: Iterable[tuple[str, bool, bool]], train_lengths: Iterator[int]
) -> Iterator[SplitPiece]:
    """Assign the start of each document to training and its end to validation; `train_lengths` are
    the lengths of the training parts, in characters.
    """
    train_length = 0
    for text, first, last in pieces:
        if first:
            train_length = next(train_lengths)
        if train_length:
            yield SplitPiece("train", text[:train_length], last=train_length <= len(text))
        if train_length < len(text):
            yield SplitPiece("val", text[train_length:], last)
        train_length = max(0, train_length - len(text))


def _train_lengths(source: Source) -> Iterator[int]:
    """Yield the length of each document's training part, in characters. Reads the source a second
    time, one document ahead, since a document may be larger than memory.
    """
    length = 0
    for text, _, last in _iter_pieces(source.train, single=False):
        length += len(text)
        if last:
            yield int(length * (1 - VAL_FRACTION)) or length
            length = 0


def _sample_train_text(source: Source, rule: SplitRule) -> Iterator[str]:
    """Sample training text to train a BPE on, spread over the whole source."""
    stride = max(1, source.size // BPE_SAMPLE_CHARS)
    pieces = assign_splits(source, rule)
    train_texts = (piece.text for piece in pieces if piece.split == "train")
    chars_sampled = 0
    for text in islice(train_texts, 0, None, stride):
        if chars_sampled < BPE_SAMPLE_CHARS:
            chars_sampled += len(text)
            yield text


def drop_blank_documents(
    pieces: Iterable[DocumentPiece], *, single: bool = False
) -> Iterator[DocumentPiece]:
    """Drop blank documents; with `single`, join all pieces into one document."""
    is_first, pending = True, None
    for text, last in pieces:
        is_blank = is_first and last and (not text or text.isspace())
        is_first = last
        if is_blank:
            continue
        if not single:
            yield DocumentPiece(text, last)
        elif pending is not None:
            yield DocumentPiece(pending, last=False)
        pending = text
    if single and pending is not None:
        yield DocumentPiece(pending)


def _iter_pieces(pieces: Iterable[DocumentPiece], single: bool) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, is first piece, is last piece). Unless `single`, newlines around documents are
    stripped.
    """
    first = True
    for text, last in drop_blank_documents(pieces, single=single):
        if first and not single:
            text = text.lstrip("\r\n")
        if last and not single:
            text = text.rstrip("\r\n")
        yield text, first, last
        first = last


def _document_key(text: str) -> str:
    """Key of a document: a hash of the start of its first piece. Newlines around the document,
    which shift the end of that piece, do not change the key.
    """
    prefix = text.strip("\r\n")[: readers.MAX_PIECE_CHARS // 2]
    return hashlib.sha256(prefix.encode("utf-8")).hexdigest()
