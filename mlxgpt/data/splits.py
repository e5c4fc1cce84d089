"""Which documents are for training and which for validation: the survey of a text, and its
documents, each for its split.

It depends on the documents' content alone, so that duplicates stay in one split, and no validation
document is trained on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from mlxgpt.data import readers
from mlxgpt.data.readers import Piece
from mlxgpt.data.sources import Source
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.char import CharTokenizer, Tokenizer
from mlxgpt.utils.errors import UserError

VAL_SHARE = 0.1  # of a single document: its end
VAL_DOCUMENTS = 100  # of many: one in so many, and
VAL_BYTES = 20_000_000  # about so much at most: all of it is read at every evaluation
LARGEST_VAL_SHARE = 0.15  # of all bytes, in whole documents; above it every document is cut
SAMPLE = 20_000_000  # characters that a BPE is trained on


class Part(NamedTuple):
    """A document, or a piece of one, for one split."""

    split: str
    text: str
    last: bool


@dataclass(frozen=True)
class SplitRule:
    """Which documents of a source, or which parts of them, are for validation.

    Attributes:
        single: whether there is one document, whose end is.
        cut: characters of a single document before that.
        every: of many documents, one in so many is,
        chosen: and the one with this key.
        tails: of many documents the end of each is, and no whole document.
    """

    single: bool
    cut: int = 0
    every: int = 0
    chosen: str = ""
    tails: bool = False

    def is_validation(self, key: str) -> bool:
        """Whether the document of a key is."""
        return key == self.chosen or (self.every > 0 and int(key, 16) % self.every == 0)


class _Reader:
    """Reads the training text once, counting; gives what a BPE is trained on."""

    def __init__(self, source: Source, rule: SplitRule, held_out: set[str]) -> None:
        self.source, self.rule, self.held_out = source, rule, held_out
        self.documents = self.validation = self.dropped = 0
        self.length = 0  # characters of the first document
        self.bytes = self.validation_bytes = 0
        self.least, self.of_least = "", 0  # the least key, and how many documents have it
        self.least_bytes = 0
        self.letters: set[str] = set()

    def read(
        self, *, letters: bool, sample: bool, progress: Callable[[int], None]
    ) -> Iterator[str]:
        """Read all of it, or as far as is needed: with `letters` or `sample`, what these need."""
        nth = max(1, self.source.size // SAMPLE)
        done = taken = 0
        key, is_training = "", True
        begins = True
        for n, (text, last) in enumerate(documents(self.source.train, single=self.source.single)):
            if begins:
                key = _key(text)
                is_training = self._count(key)
            begins = last
            if self.documents == 1:
                self.length += len(text)
            self._count_bytes(key, text)
            if letters:
                self.letters.update(text)
            done += len(text)
            progress(done)
            if is_training and n % nth == 0 and taken < SAMPLE:
                taken += len(text)
                yield text
            sampled = not sample or (self.source.alike and taken >= SAMPLE)
            if sampled and not letters and self._decided():
                return

    def _decided(self) -> bool:
        """Whether reading more cannot change which documents are for validation."""
        if self.source.val is not None:
            return self.documents > max(1, self.dropped)
        return self.source.alike and 0 < self.validation < self.documents

    @property
    def validation_share(self) -> float:
        """Share of the bytes that are for validation if no document is cut."""
        return (self.validation_bytes or self.least_bytes) / max(1, self.bytes)

    def _count_bytes(self, key: str, text: str) -> None:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        self.bytes += size
        self.validation_bytes += size * self.rule.is_validation(key)
        self.least_bytes += size * (key == self.least)

    def _count(self, key: str) -> bool:
        """Count a document; whether it is one to train on."""
        self.documents += 1
        if not self.least or key < self.least:
            self.least, self.of_least, self.least_bytes = key, 0, 0
        self.of_least += key == self.least
        held_out, dropped = self.rule.is_validation(key), key in self.held_out
        self.validation += held_out
        self.dropped += dropped
        return not held_out and not dropped


def survey(
    source: Source, kind: str, progress: Callable[[int], None]
) -> tuple[SplitRule, Tokenizer | None]:
    """Read a source as far as is needed to decide the split, and to make its tokenizer (none for
    `gpt2`, which there is already).

    Args:
        kind: `char`, `gpt2`, or `bpe` and the vocabulary's size, as `bpe4096`.
        progress: is told how many characters were read.

    Raises:
        UserError: for a text that cannot be trained on.
    """
    is_char, is_bpe = kind == "char", kind.startswith("bpe")
    every = max(VAL_DOCUMENTS, source.size // VAL_BYTES) if source.val is None else 0
    rule = SplitRule(source.single, every=every)
    held_out: set[str] = set()
    letters: set[str] = set()
    validation = 0
    for text, first, _ in _marked(source.val or (), source.single):
        validation += first
        if first:
            held_out.add(_key(text))
        if is_char:
            letters.update(text)
    reader = _Reader(source, rule, held_out)
    stream = reader.read(letters=is_char, sample=is_bpe, progress=progress)
    tokenizer: Tokenizer | None = bpe.train(stream, int(kind[3:])) if is_bpe else None
    deque(stream, maxlen=0)
    if not reader.documents or (source.val is not None and not validation):
        names = ", ".join(source.origin.get("files", [source.name]))
        raise UserError(f"there is no text in {names}", "give files that are not empty.")
    if source.val is not None:
        if reader.dropped == reader.documents:
            raise UserError(
                "every training document is in the validation text too",
                "give --source and --val-source different texts.",
            )
        if reader.documents == validation == 1:
            rule = SplitRule(single=True)
    elif reader.documents == 1:
        rule = SplitRule(single=True, cut=int(reader.length * (1 - VAL_SHARE)))
    else:
        if not reader.validation:
            rule = SplitRule(single=False, every=every, chosen=reader.least)
        if reader.documents in (reader.validation, reader.of_least):
            raise UserError(
                "all documents are the same, so none is left for validation",
                "give a text with more than one document, or --val-source.",
            )
        if reader.validation_share > LARGEST_VAL_SHARE:
            rule = SplitRule(single=False, tails=True)
            if is_bpe:
                tokenizer = bpe.train(_training_sample(source, rule), int(kind[3:]))
    if is_char:
        letters |= reader.letters
        if len(letters) < 2:
            raise UserError(
                f"the text is nothing but {next(iter(letters), '')!r}: there is nothing to learn",
                "give a text of at least two different characters.",
            )
        # Both splits' letters: one that only the validation text has would have no id otherwise.
        tokenizer = CharTokenizer(letters, end_of_text=not rule.single)
    return rule, tokenizer


def parts(source: Source, rule: SplitRule) -> Iterator[Part]:
    """The documents of a source, each for its split; none is in both."""
    held_out: set[str] = set()
    for text, first, last in _marked(source.val or (), rule.single):
        if first:
            held_out.add(_key(text))
        yield Part("val", text, last)
    if rule.cut:
        yield from _cut(_marked(source.train, single=True), iter([rule.cut]))
        return
    if rule.tails:
        yield from _cut(_marked(source.train, single=False), _cuts(source))
        return
    split = "train"
    for text, first, last in _marked(source.train, rule.single):
        if first:
            key = _key(text)
            split = "val" if rule.is_validation(key) else "" if key in held_out else "train"
        if split:
            yield Part(split, text, last)


def _cut(marked: Iterable[tuple[str, bool, bool]], cuts: Iterator[int]) -> Iterator[Part]:
    """Each document's beginning for training, and its end for validation; `cuts` are the lengths
    of the beginnings, in characters.
    """
    cut = 0
    for text, first, last in marked:
        if first:
            cut = next(cuts)
        if cut:
            yield Part("train", text[:cut], last=cut <= len(text))
        if cut < len(text):
            yield Part("val", text[cut:], last)
        cut = max(0, cut - len(text))


def _cuts(source: Source) -> Iterator[int]:
    """The length of each document's beginning, in characters: a second reading of the source, one
    document ahead of the one that is cut, since a document may be larger than the memory.
    """
    length = 0
    for text, _, last in _marked(source.train, single=False):
        length += len(text)
        if last:
            yield int(length * (1 - VAL_SHARE)) or length
            length = 0


def _training_sample(source: Source, rule: SplitRule) -> Iterator[str]:
    """Some of the training text, spread over it, for a BPE to be trained on."""
    nth = max(1, source.size // SAMPLE)
    training = (part.text for part in parts(source, rule) if part.split == "train")
    taken = 0
    for text in islice(training, 0, None, nth):
        if taken < SAMPLE:
            taken += len(text)
            yield text


def documents(pieces: Iterable[Piece], *, single: bool = False) -> Iterator[Piece]:
    """The same without blank documents; with `single`, all as one document."""
    begins, held = True, None
    for text, last in pieces:
        blank = begins and last and (not text or text.isspace())
        begins = last
        if blank:
            continue
        if not single:
            yield Piece(text, last)
        elif held is not None:
            yield Piece(held, last=False)
        held = text
    if single and held is not None:
        yield Piece(held)


def _marked(pieces: Iterable[Piece], single: bool) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether it begins its document, whether it ends it) of each piece; of several
    documents, without the newlines around them.
    """
    first = True
    for text, last in documents(pieces, single=single):
        if first and not single:
            text = text.lstrip("\r\n")
        if last and not single:
            text = text.rstrip("\r\n")
        yield text, first, last
        first = last


def _key(text: str) -> str:
    """A document's identity, from its first piece: from as much of it as newlines before and after
    the document, which move its end, leave alone.
    """
    beginning = text.strip("\r\n")[: readers.PIECE // 2]
    return hashlib.sha256(beginning.encode("utf-8")).hexdigest()
