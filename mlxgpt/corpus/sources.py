"""Where documents come from: files and folders, the Hugging Face hub, the storybook.

A source is streams of documents, to train on and to judge by, and a note on their origin. It knows
nothing of tokens.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.corpus import hub, readers, storybook
from mlxgpt.corpus.readers import Piece
from mlxgpt.errors import UserError

VAL_SHARE_STORIES = 0.01  # of the storybook's length, in stories of their own


@dataclass(frozen=True)
class Source:
    """Documents to train on and to judge by.

    Attributes:
        name: a short name, for the data folder.
        origin: what meta.json records of it; equal origins mean equal text.
        train: the documents, a new stream for each reader.
        val: those to judge by; None: a part of `train`.
        size: about how many bytes of text `train` has.
        single: whether both sides are pieces of one document, with no end-of-text between.
        alike: whether any part of it is like the whole.
    """

    name: str
    origin: dict[str, Any]
    train: Iterable[Piece]
    val: Iterable[Piece] | None
    size: int
    single: bool = False
    alike: bool = False


STORYBOOK = "storybook"
STORYBOOK_MEGABYTES = 10.0
CORPORA = (*hub.HUB, STORYBOOK)


def open_source(
    source: Sequence[str], val_source: Sequence[str] = (), megabytes: float | None = None
) -> Source:
    """Find the documents that `source` names: a corpus by name, or files and folders of text.

    Args:
        megabytes: how much the storybook shall write; default STORYBOOK_MEGABYTES.

    Raises:
        UserError: if something is missing or unreadable.
    """
    check_request(source, val_source, megabytes)
    name = corpus_name(source)
    if name == STORYBOOK:
        megabytes = STORYBOOK_MEGABYTES if megabytes is None else megabytes
        if not 0.01 <= megabytes <= 1e6:
            raise UserError(
                f"--megabytes {megabytes:g} is no length for the storybook",
                f"give a number from 0.01 to 1000000; the default is {STORYBOOK_MEGABYTES:g}.",
            )
        train = _Stories(seed=0, size=int(1e6 * megabytes))
        val = _Stories(seed=1, size=int(1e6 * megabytes * VAL_SHARE_STORIES))
        return Source(
            name, corpus_origin(name, megabytes), train, val, int(1e6 * megabytes), alike=True
        )
    if name:
        train_files, val_files = hub.load(name)
        single = hub.HUB[name].single
        return Source(
            name,
            hub.origin(name),
            _Files(train_files, single),
            _Files(val_files, single) if val_files else None,
            sum(map(readers.text_size, train_files)),
            single,
        )
    return _from_files(source, val_source)


def check_request(
    source: Sequence[str], val_source: Sequence[str], megabytes: float | None
) -> None:
    """Refuse what a source cannot have, whether or not it is prepared already."""
    name = corpus_name(source)
    if name and val_source:
        raise UserError(f"{name} has its own text to judge by", "leave out --val-source.")
    if megabytes is not None and name != STORYBOOK:
        raise UserError(
            "only the storybook is written to a length", "leave out --megabytes, or use storybook."
        )


def corpus_name(source: Sequence[str]) -> str | None:
    """The corpus that a source names; not where a file or folder has that name."""
    name = source[0] if len(source) == 1 else None
    return name if name in CORPORA and not Path(name).exists() else None


def corpus_origin(name: str, megabytes: float | None = None) -> dict[str, Any]:
    """What is known of a corpus' origin without opening it."""
    if name != STORYBOOK:
        return hub.origin(name)
    length = {} if megabytes is None else {"megabytes": megabytes}
    return {STORYBOOK: storybook.book().sha256, **length}


@dataclass(frozen=True)
class _Stories:
    """The storybook's stories of a seed, `size` bytes of them, made anew for each reader."""

    seed: int
    size: int

    def __iter__(self) -> Iterator[Piece]:
        return map(Piece, storybook.stories(self.seed, size=self.size))


@dataclass(frozen=True)
class _Files:
    """The documents of some files, read anew for each reader.

    Attributes:
        joined: whether all of them are pieces of one document.
    """

    paths: Sequence[Path]
    joined: bool = False

    def __iter__(self) -> Iterator[Piece]:
        for path in self.paths:
            for piece in readers.read(path):
                yield Piece(piece.text, last=False) if self.joined else piece


def source_name(source: Sequence[str]) -> str:
    """The data folder's name for a source: the corpus, or the first path's stem."""
    stem = Path(source[0]).stem if source else ""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "text"


def open_files(paths: Sequence[str]) -> Iterable[Piece]:
    """The documents of some files and folders, a new stream for each reader.

    Raises:
        UserError: if there is none of a name.
    """
    return _Files(_expand(paths))


def _from_files(source: Sequence[str], val_source: Sequence[str]) -> Source:
    paths, val_paths = _expand(source), _expand(val_source)
    origin: dict[str, Any] = {"files": [Path(p).name for p in source], "sha256": _digest(paths)}
    if val_paths:
        origin["val_files"] = [Path(p).name for p in val_source]
        origin["val_sha256"] = _digest(val_paths)
    return Source(
        source_name(source),
        origin,
        _Files(paths),
        _Files(val_paths) if val_paths else None,
        sum(map(readers.text_size, paths)),
    )


def _digest(paths: Sequence[Path]) -> str:
    """The sha256 of one file, or of those of several."""
    try:
        digests = [files.sha256(path) for path in paths]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}", "check the file and its permissions."
        ) from error
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    )


def _expand(paths: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in readers.SUFFIXES)
            if not inside:
                raise UserError(
                    f"no {', '.join(readers.SUFFIXES)} file in the folder {name}",
                    "name the files themselves.",
                )
            found += inside
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise UserError(f"{name} is no file", "write what it gives to a file first.")
        elif glob.has_magic(name):  # in quotes, or in Python, no shell has expanded it
            matching = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matching:
                raise UserError(f"no file matches {name!r}", "give a path that exists.")
            found += [match for match in matching if match.is_file()]
        else:
            raise UserError(
                f"there is no file, folder or corpus {name!r}",
                f"give a path that exists, or one of {', '.join(CORPORA)}.",
            )
    return found
