"""Where documents come from: files and folders, the Hugging Face hub, the storybook.

A source is streams of documents, for training and for validation, and a note on their origin. It
knows nothing of tokens.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.data import folders, formats, hub, readers, synthetic
from mlxgpt.data.hash_cache import Verified
from mlxgpt.data.hub import HubDataset, Rows
from mlxgpt.data.readers import COLUMN, Piece
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

LONGEST_NAME = 180  # bytes of a data folder's name; file systems allow 255, and names get longer
VAL_SHARE_STORIES = 0.01  # of the storybook's length, in stories of their own


@dataclass(frozen=True)
class Source:
    """Documents for training and for validation.

    Attributes:
        name: a short name, for the data folder.
        origin: what meta.json records of it; equal origins mean equal text.
        train: the documents, a new stream for each reader.
        val: those for validation; None: a part of `train`.
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
    source: Sequence[str],
    val_source: Sequence[str] = (),
    megabytes: float | None = None,
    verified: Verified | None = None,
) -> Source:
    """Find the documents that `source` names: a corpus by name, a dataset of the hub, or files and
    folders of text.

    Args:
        megabytes: how much the storybook shall write; default STORYBOOK_MEGABYTES.
        verified: knows the hashes of files that were read before.

    Raises:
        Unavailable: if the text is not here, and could not be downloaded.
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
            name, corpus_origin(source, megabytes), train, val, int(1e6 * megabytes), alike=True
        )
    if name and (text := hub.find_dataset(name)):
        return _from_hub(source_name(source), text)
    return _from_files(source, val_source, verified)


def origin_of_gone(
    source: Sequence[str], val_source: Sequence[str], verified: Verified
) -> dict[str, Any] | None:
    """The origin of files that were read once and are not there any more; None where all are, or
    it is not known.
    """
    if all(
        glob.has_magic(name) or files.exists(_place(name)[0]) for name in (*source, *val_source)
    ):
        return None
    origin: dict[str, Any] = {}
    for kind, names in (("files", source), ("val_files", val_source)):
        if names:
            found = verified.recall(kind)
            if found.get("paths") != _absolute(names):
                return None
            origin |= _told(kind, names, str(found.get("sha256")))
    return origin


def check_request(
    source: Sequence[str], val_source: Sequence[str], megabytes: float | None
) -> None:
    """Refuse what a source cannot have, whether or not it is prepared already."""
    name = corpus_name(source)
    if name and val_source:
        raise UserError(f"{name} has its own validation text", "leave out --val-source.")
    if megabytes is not None and name != STORYBOOK:
        raise UserError(
            "only the storybook is written to a length", "leave out --megabytes, or use storybook."
        )


def corpus_name(source: Sequence[str]) -> str | None:
    """The corpus or the hub's dataset that a source names; not where a file or folder has that
    name.
    """
    if any(name.startswith(hub.PREFIX) for name in source) and len(source) > 1:
        raise UserError("a dataset of the hub is a source by itself", "give one of them alone.")
    name = source[0] if len(source) == 1 else None
    if name is None or files.exists(Path(name)):
        return None
    return name if name == STORYBOOK or hub.find_dataset(name) else None


def hub_text(source: Sequence[str]) -> HubDataset | None:
    """The text of the hub that a source names, if it names one."""
    name = corpus_name(source)
    return hub.find_dataset(name) if name else None


def corpus_origin(source: Sequence[str], megabytes: float | None = None) -> dict[str, Any]:
    """What is known of a corpus' origin without opening it."""
    if text := hub_text(source):
        return hub.origin(text)
    length = {} if megabytes is None else {"megabytes": megabytes}
    return {STORYBOOK: synthetic.book().sha256, **length}


def comparable(origin: Mapping[str, Any]) -> str:
    """A text that is equal for equal origins. Names of files may differ in their Unicode form,
    which a file system chooses, and in case, which it may ignore; their hashes are there as well.
    """
    names = {kind: str(origin.get(kind)).casefold() for kind in ("files", "val_files")}
    tree = json.dumps({**origin, **names}, sort_keys=True, ensure_ascii=False)
    return unicodedata.normalize("NFC", tree)


def told(origin: dict[str, Any]) -> str:
    """Which text an origin tells of, in a few words."""
    if STORYBOOK in origin:
        return "the built-in storybook"
    if "hub" in origin:
        column = f", column {origin['column']}" if "column" in origin else ""
        return f"{origin['hub']}{column}"
    if "nanogpt" in origin:
        return f"nanoGPT's arrays in {origin['nanogpt']}"
    return ", ".join(origin.get("files", ["unknown"]))


@dataclass(frozen=True)
class _Stories:
    """The storybook's stories of a seed, `size` bytes of them, made anew for each reader."""

    seed: int
    size: int

    def __iter__(self) -> Iterator[Piece]:
        return map(Piece, synthetic.stories(self.seed, size=self.size))


@dataclass(frozen=True)
class _Files:
    """The documents of some files, read anew for each reader.

    Attributes:
        rows: the files, and which of their documents.
        column: of a table, the one that holds them.
        joined: whether all of them are pieces of one document.
        columns: of each file, where they differ.
    """

    rows: Rows
    column: str = COLUMN
    joined: bool = False
    columns: Sequence[str] = ()

    def __iter__(self) -> Iterator[Piece]:
        columns = self.columns or [self.column] * len(self.rows.paths)
        files = zip(self.rows.paths, columns, strict=True)
        pieces = (piece for path, column in files for piece in readers.read(path, column))
        for piece in _within(pieces, *self.rows.span):
            yield Piece(piece.text, last=False) if self.joined else piece


def _within(pieces: Iterator[Piece], start: int, stop: int | None) -> Iterator[Piece]:
    """The pieces of the documents from `start` on, up to `stop`."""
    number = 0
    for piece in pieces:
        if stop is not None and number >= stop:
            return
        if number >= start:
            yield piece
        number += piece.last


def source_name(source: Sequence[str]) -> str:
    """The data folder's name for a source: the corpus, the dataset's owner and name, or the first
    path's stem. Letters and digits of all scripts stay, in Unicode's NFC, whichever form a file
    system has; a hash makes names differ where nothing else is left, or a name is too long.
    """
    stem = unicodedata.normalize("NFC", _stem(source))
    kept = (c if _stays(c) else " " for c in stem)
    name = re.sub(" +", "-", "".join(kept)).strip("-.")
    if not name and stem.strip("."):
        name = f"text-{_short_hash(stem)}"
    if len(name.encode()) > LONGEST_NAME:
        name = name.encode()[:LONGEST_NAME].decode("utf-8", "ignore")
        name = f"{name.strip('-.')}-{_short_hash(stem)}"
    return name or "text"


def former_name(source: Sequence[str]) -> str:
    """The name that `source_name` gave when it kept ASCII letters alone."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", _stem(source)).strip("-.") or "text"


def open_files(paths: Sequence[str]) -> Iterable[Piece]:
    """The documents of some files and folders, a new stream for each reader. What is left out
    is logged.

    Raises:
        UserError: if there is none of a name.
    """
    return _files(_expand(paths))


def _stem(source: Sequence[str]) -> str:
    first = source[0] if source else ""
    if first.startswith(hub.PREFIX):
        return first.removeprefix(hub.PREFIX)
    path, column = _place(first)
    return path.stem if column == COLUMN else f"{path.stem}-{column}"


def _stays(c: str) -> bool:
    """Whether a character stays in a name: letters with their marks, digits, and `._-`."""
    return c.isalnum() or c in "._-" or unicodedata.category(c).startswith("M")


def _short_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _files(files: Sequence[tuple[Path, str]]) -> _Files:
    return _Files(Rows([path for path, _ in files]), columns=[column for _, column in files])


def _from_hub(name: str, dataset: HubDataset) -> Source:
    rows = hub.load_rows(dataset)
    revision = {"revision": rows.revision} if rows.revision else {}
    return Source(
        name,
        {**hub.origin(dataset), **revision},
        _Files(rows.train, dataset.column, dataset.single),
        _Files(rows.val, dataset.column, dataset.single) if rows.val else None,
        sum(map(readers.text_size, rows.train.paths)),
        dataset.single,
    )


def _from_files(
    source: Sequence[str],
    val_source: Sequence[str],
    verified: Verified | None,
) -> Source:
    train, val = _expand(source), _expand(val_source)
    paths, val_paths = [path for path, _ in train], [path for path, _ in val]

    def origin_of(kind: str, names: Sequence[str], paths: Sequence[Path]) -> dict[str, Any]:
        def find() -> dict[str, Any]:
            return {"paths": _absolute(names), "sha256": _digest(paths)}

        found = verified.once(kind, paths, find) if verified else find()
        return _told(kind, names, found["sha256"])

    origin = origin_of("files", source, paths)
    if val_paths:
        origin |= origin_of("val_files", val_source, val_paths)
    return Source(
        source_name(source),
        origin,
        _files(train),
        _files(val) if val else None,
        sum(map(readers.text_size, paths)),
    )


def _told(kind: str, names: Sequence[str], sha256: str) -> dict[str, Any]:
    """What an origin says of some files: `kind` is "files" or "val_files"."""
    return {kind: [Path(name).name for name in names], kind.replace("files", "sha256"): sha256}


def _absolute(names: Sequence[str]) -> list[str]:
    return [str(_path(name).absolute()) for name in names]


def _path(name: str) -> Path:
    return files.expand_user(name)


def _place(name: str) -> tuple[Path, str]:
    """A source's path, and the column that holds its documents: `FILE:COLUMN`, or only FILE."""
    path = _path(name)
    before, colon, column = name.rpartition(":")
    if not colon or not column or files.lexists(path):
        return path, COLUMN
    table = _path(before)
    is_table = table.suffix.lower() in readers.TABLES or files.exists(table)
    return (table, column) if is_table else (path, COLUMN)


def _digest(paths: Sequence[Path]) -> str:
    """The sha256 of one file, or of those of several."""
    try:
        digests = [files.sha256(path) for path in paths]
    except OSError as error:
        raise files.os_error(error, "read", paths[0]) from error
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    )


def _expand(names: Sequence[str]) -> list[tuple[Path, str]]:
    """The files that names stand for, each with the column that holds its documents."""
    files = [file for name in names for file in _matching(name)]
    remarks = (remark for path, _ in files if (remark := formats.remark(path)))
    for remark in itertools.islice(remarks, 1):
        logger.info(remark)
    return files


def _matching(name: str) -> list[tuple[Path, str]]:
    path, column = _place(name)
    if files.is_folder(path):
        paths = folders.text_files(path, readers.SUFFIXES)
        if not paths:
            raise UserError(
                f"no {', '.join(readers.SUFFIXES)} file in the folder {name}",
                "name the files themselves.",
            )
    elif files.is_file(path):
        paths = [path]
    elif files.exists(path):
        raise UserError(f"{name} is not a file", "write what it gives to a file first.")
    elif path.is_symlink():
        raise UserError(
            f"{name} is a broken link: {path.readlink()} does not exist",
            "restore what it links to, or name the file itself.",
        )
    elif glob.has_magic(str(path)):  # in quotes, or in Python, no shell has expanded it
        matches = folders.expand_pattern(path)
        if not matches:
            raise UserError(f"no file matches {name!r}", "give a path that exists.")
        paths = [p for p in matches if files.is_file(p) and not folders.is_leftover(p.name)]
    else:
        raise UserError(
            f"there is no file, folder or corpus {name!r}",
            f"give a path that exists, or one of {', '.join(CORPORA)}.",
        )
    return [(file, column) for file in paths]
