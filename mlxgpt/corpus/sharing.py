"""Which documents are learnt and which judge: the survey of a text, and its documents shared out.

What is decided hangs on the documents' content alone, so that duplicates stay on one side, and no
document that judges is learnt.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mlxgpt.corpus import bpe, readers
from mlxgpt.corpus.readers import Piece
from mlxgpt.corpus.sources import Source
from mlxgpt.corpus.tokenizer import CharTokenizer, Tokenizer
from mlxgpt.errors import UserError

VAL_SHARE = 0.1  # of a single document: its end
VAL_DOCUMENTS = 100  # of many: one in so many, and
VAL_BYTES = 20_000_000  # about so much at most: all of it is read at every evaluation
SAMPLE = 20_000_000  # characters that a BPE is trained on


class Part(NamedTuple):
    """A document, or a piece of one, for one side."""

    split: str
    text: str
    last: bool


@dataclass(frozen=True)
class Sharing:
    """How the documents of a source are shared out.

    Attributes:
        single: whether there is one document, whose end judges.
        cut: characters of a single document to train on.
        every: of many documents, one in so many judges,
        chosen: and the one with this key.
    """

    single: bool
    cut: int = 0
    every: int = 0
    chosen: str = ""

    def judges(self, key: str) -> bool:
        """Whether the document of a key is one to judge by."""
        return key == self.chosen or (self.every > 0 and int(key, 16) % self.every == 0)


class _Reader:
    """Reads the text to train on once, counting; gives what a BPE is to learn from."""

    def __init__(self, source: Source, sharing: Sharing, held_out: set[str]) -> None:
        self.source, self.sharing, self.held_out = source, sharing, held_out
        self.documents = self.judging = self.dropped = 0
        self.length = 0  # characters of the first document
        self.least, self.of_least = "", 0  # the least key, and how many documents have it
        self.letters: set[str] = set()

    def read(self, *, letters: bool, sample: bool, watch: Callable[[int], None]) -> Iterator[str]:
        """Read all of it, or as far as is needed: with `letters` or `sample`, what these need."""
        nth = max(1, self.source.size // SAMPLE)
        done = taken = 0
        learnt = True
        begins = True
        for n, (text, last) in enumerate(documents(self.source.train, single=self.source.single)):
            if begins:
                learnt = self._count(_key(text))
            begins = last
            if self.documents == 1:
                self.length += len(text)
            if letters:
                self.letters.update(text)
            done += len(text)
            watch(done)
            if learnt and n % nth == 0 and taken < SAMPLE:
                taken += len(text)
                yield text
            sampled = not sample or (self.source.alike and taken >= SAMPLE)
            if sampled and not letters and self._decided():
                return

    def _decided(self) -> bool:
        """Whether reading on cannot change who judges."""
        if self.source.val is not None:
            return self.documents > max(1, self.dropped)
        return 0 < self.judging < self.documents

    def _count(self, key: str) -> bool:
        """Count a document; whether it is one to learn from."""
        self.documents += 1
        if not self.least or key < self.least:
            self.least, self.of_least = key, 0
        self.of_least += key == self.least
        judges, dropped = self.sharing.judges(key), key in self.held_out
        self.judging += judges
        self.dropped += dropped
        return not judges and not dropped


def survey(
    source: Source, kind: str, watch: Callable[[int], None]
) -> tuple[Sharing, Tokenizer | None]:
    """Read a source as far as is needed to decide who judges, and to make its tokenizer (none for
    `gpt2`, which there is already).

    Args:
        kind: `char`, `gpt2`, or `bpe` and the vocabulary's size, as `bpe4096`.
        watch: is told how many characters were read.

    Raises:
        UserError: for a text that cannot be learnt from.
    """
    is_char, is_bpe = kind == "char", kind.startswith("bpe")
    every = max(VAL_DOCUMENTS, source.size // VAL_BYTES) if source.val is None else 0
    sharing = Sharing(source.single, every=every)
    held_out: set[str] = set()
    letters: set[str] = set()
    judging = 0
    for text, first, _ in _marked(source.val or (), source.single):
        judging += first
        if first:
            held_out.add(_key(text))
        if is_char:
            letters.update(text)
    reader = _Reader(source, sharing, held_out)
    stream = reader.read(letters=is_char, sample=is_bpe, watch=watch)
    tokenizer: Tokenizer | None = bpe.train(stream, int(kind[3:])) if is_bpe else None
    deque(stream, maxlen=0)
    if not reader.documents or (source.val is not None and not judging):
        names = ", ".join(source.origin.get("files", [source.name]))
        raise UserError(f"there is no text in {names}", "give files that are not empty.")
    if source.val is not None:
        if reader.dropped == reader.documents:
            raise UserError(
                "every training document is in the validation text too",
                "give --source and --val-source different texts.",
            )
        if reader.documents == judging == 1:
            sharing = Sharing(single=True)
    elif reader.documents == 1:
        sharing = Sharing(single=True, cut=int(reader.length * (1 - VAL_SHARE)))
    else:
        if not reader.judging:
            sharing = Sharing(single=False, every=every, chosen=reader.least)
        if reader.documents in (reader.judging, reader.of_least):
            raise UserError(
                "all documents are the same, so none is left to judge by",
                "give a text with more than one document, or --val-source.",
            )
    if is_char:
        letters |= reader.letters
        if len(letters) < 2:
            raise UserError(
                f"the text is nothing but {next(iter(letters), '')!r}: there is nothing to learn",
                "give a text of at least two different characters.",
            )
        # Both sides' letters: one that only the validation text has would have no id otherwise.
        tokenizer = CharTokenizer(letters, end_of_text=not sharing.single)
    return sharing, tokenizer


def parts(source: Source, sharing: Sharing) -> Iterator[Part]:
    """The documents of a source, each for its side; a document that judges is never learnt."""
    held_out: set[str] = set()
    for text, first, last in _marked(source.val or (), sharing.single):
        if first:
            held_out.add(_key(text))
        yield Part("val", text, last)
    if sharing.cut:
        yield from _halves(source, sharing.cut)
        return
    split = "train"
    for text, first, last in _marked(source.train, sharing.single):
        if first:
            key = _key(text)
            split = "val" if sharing.judges(key) else "" if key in held_out else "train"
        if split:
            yield Part(split, text, last)


def _halves(source: Source, cut: int) -> Iterator[Part]:
    """A single document's beginning, of `cut` characters, and its end."""
    for text, _, last in _marked(source.train, single=True):
        if cut:
            yield Part("train", text[:cut], last=cut <= len(text))
        if cut < len(text):
            yield Part("val", text[cut:], last)
        cut = max(0, cut - len(text))


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
