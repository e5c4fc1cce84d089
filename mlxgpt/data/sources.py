"""Data sources: files and folders, Hugging Face Hub datasets, and built-in synthetic stories.

A source provides documents for training and validation, and a description of their origin.
Tokenization is in tokenize.py.
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
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.hub import FileRows, HubDataset
from mlxgpt.data.readers import DEFAULT_COLUMN, DocumentPiece
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"  # name of the built-in corpus


@dataclass(frozen=True)
class Source:
    """Documents for training and for validation.

    Attributes:
        name: short name, used for the data folder.
        origin: stored in meta.json; equal origins mean equal text.
        train: training documents; each iteration reads them again.
        val: validation documents; None: split from `train`.
        size: estimated bytes of text in `train`.
        single: whether both splits are parts of one document, without end-of-text between them.
        is_homogeneous: whether every part of it is representative of the whole.
    """

    name: str
    origin: dict[str, Any]
    train: Iterable[DocumentPiece]
    val: Iterable[DocumentPiece] | None
    size: int
    single: bool = False
    is_homogeneous: bool = False


SYNTHETIC_MEGABYTES = 10.0  # default size of the training text
SYNTHETIC_VAL_FRACTION = 0.01  # size relative to the training text


def open_source(
    source: Sequence[str],
    val_source: Sequence[str] = (),
    megabytes: float | None = None,
    hash_cache: HashCache | None = None,
) -> Source:
    """Open a source: the built-in corpus, a Hub dataset, or files and folders of text.

    Args:
        megabytes: size of the synthetic stories in MB; default: SYNTHETIC_MEGABYTES.
        hash_cache: hashes of files that were read before.

    Raises:
        DatasetUnavailableError: if the dataset is not cached and could not be downloaded.
        UserError: if something is missing or unreadable.
    """
    check_source_args(source, val_source, megabytes)
    name = corpus_name(source)
    if name == SYNTHETIC:
        megabytes = SYNTHETIC_MEGABYTES if megabytes is None else megabytes
        if not 0.01 <= megabytes <= 1e6:
            raise UserError(
                f"--megabytes {megabytes:g} is out of range",
                f"use a value from 0.01 to 1,000,000; the default is {SYNTHETIC_MEGABYTES:g}.",
            )
        size = int(1e6 * megabytes)
        train = _SyntheticDocuments(seed=0, size=size)
        val = _SyntheticDocuments(seed=1, size=int(1e6 * megabytes * SYNTHETIC_VAL_FRACTION))
        origin = corpus_origin(source, megabytes)
        return Source(name, origin, train, val, size, is_homogeneous=True)
    if name and (dataset := hub.find_hub_dataset(name)):
        return _open_hub_source(data_folder_name(source), dataset)
    return _open_file_source(source, val_source, hash_cache)


def origin_of_missing_files(
    source: Sequence[str], val_source: Sequence[str], hash_cache: HashCache
) -> dict[str, Any] | None:
    """Cached origin of files if some of them no longer exist; None if all exist, or the origin is
    not cached.
    """
    if all(
        glob.has_magic(name) or files.exists(_split_column(name)[0])
        for name in (*source, *val_source)
    ):
        return None
    origin: dict[str, Any] = {}
    for kind, names in (("files", source), ("val_files", val_source)):
        if names:
            entry = hash_cache.lookup(kind)
            if entry.get("paths") != _absolute_paths(names):
                return None
            origin |= _origin_fields(kind, names, str(entry.get("sha256")))
    return origin


def check_source_args(
    source: Sequence[str], val_source: Sequence[str], megabytes: float | None
) -> None:
    """Raise UserError for arguments that the source does not support."""
    name = corpus_name(source)
    if name and val_source:
        raise UserError(f"{name} has its own validation split", "omit --val-source.")
    if megabytes is not None and name != SYNTHETIC:
        raise UserError(
            f"--megabytes is supported for {SYNTHETIC} only",
            f"omit --megabytes, or use {SYNTHETIC}.",
        )


def corpus_name(source: Sequence[str]) -> str | None:
    """Name of the built-in corpus or Hub dataset; None for files and folders, which come first."""
    if any(name.startswith(hub.HUB_PREFIX) for name in source) and len(source) > 1:
        raise UserError(
            "a Hub dataset cannot be mixed with other sources", "use it as the only source."
        )
    name = source[0] if len(source) == 1 else None
    if name is None or files.exists(Path(name)):
        return None
    return name if name == SYNTHETIC or hub.find_hub_dataset(name) else None


def resolve_hub_dataset(source: Sequence[str]) -> HubDataset | None:
    """The Hub dataset that a source names, if any."""
    dataset_name = corpus_name(source)
    return hub.find_hub_dataset(dataset_name) if dataset_name else None


def corpus_origin(source: Sequence[str], megabytes: float | None = None) -> dict[str, Any]:
    """Origin of the built-in corpus or a Hub dataset, as far as known without opening it."""
    if dataset := resolve_hub_dataset(source):
        return hub.hub_origin(dataset)
    size_fields = {} if megabytes is None else {"megabytes": megabytes}
    return {SYNTHETIC: synthetic.load_grammar().sha256, **size_fields}


def canonicalize_origin(origin: Mapping[str, Any]) -> str:
    """A string that is equal for equal origins. Case and Unicode form of file names are ignored,
    since they depend on the file system; the origin also contains the files' hashes.
    """
    names = {kind: str(origin.get(kind)).casefold() for kind in ("files", "val_files")}
    serialized = json.dumps({**origin, **names}, sort_keys=True, ensure_ascii=False)
    return unicodedata.normalize("NFC", serialized)


def describe_origin(origin: dict[str, Any]) -> str:
    """Short description of an origin, to show to users."""
    if SYNTHETIC in origin:
        return "the synthetic stories"
    if "hub" in origin:
        column = f", column {origin['column']}" if "column" in origin else ""
        return f"{origin['hub']}{column}"
    if "nanogpt" in origin:
        return f"nanoGPT arrays in {origin['nanogpt']}"
    return ", ".join(origin.get("files", ["unknown"]))


@dataclass(frozen=True)
class _SyntheticDocuments:
    """`size` bytes of synthetic stories with a seed, generated again at each iteration."""

    seed: int
    size: int

    def __iter__(self) -> Iterator[DocumentPiece]:
        return map(DocumentPiece, synthetic.generate_stories(self.seed, size=self.size))


@dataclass(frozen=True)
class _FileDocuments:
    """The documents of some files, read again at each iteration.

    Attributes:
        rows: the files, and the range of their documents.
        column: table column with the documents.
        single: whether all of them are pieces of one document.
        columns: the column for each file, if they differ.
    """

    rows: FileRows
    column: str = DEFAULT_COLUMN
    single: bool = False
    columns: Sequence[str] = ()

    def __iter__(self) -> Iterator[DocumentPiece]:
        columns = self.columns or [self.column] * len(self.rows.paths)
        path_columns = zip(self.rows.paths, columns, strict=True)
        pieces = (
            piece for path, column in path_columns for piece in readers.read_documents(path, column)
        )
        for piece in _slice_documents(pieces, *self.rows.row_range):
            yield DocumentPiece(piece.text, last=False) if self.single else piece


def _slice_documents(
    pieces: Iterator[DocumentPiece], start: int, stop: int | None
) -> Iterator[DocumentPiece]:
    """Yield the pieces of documents `start` to `stop` (exclusive)."""
    index = 0
    for piece in pieces:
        if stop is not None and index >= stop:
            return
        if index >= start:
            yield piece
        index += piece.last


MAX_NAME_BYTES = 180  # file systems allow 255; suffixes are added


def data_folder_name(source: Sequence[str]) -> str:
    """Data folder name for a source: the corpus, the Hub dataset's owner and name, or the stem of
    the first path. Letters and digits of all scripts are kept, in NFC. A hash is added if the name
    is too long, and used alone if nothing else is left.
    """
    stem = unicodedata.normalize("NFC", _stem(source))
    characters = (c if _is_name_character(c) else " " for c in stem)
    name = re.sub(" +", "-", "".join(characters)).strip("-.")
    if not name and stem.strip("."):
        name = f"text-{_short_hash(stem)}"
    if len(name.encode()) > MAX_NAME_BYTES:
        name = name.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore")
        name = f"{name.strip('-.')}-{_short_hash(stem)}"
    return name or "text"


def legacy_data_folder_name(source: Sequence[str]) -> str:
    """Data folder name in older versions: ASCII letters only, `storybook` for `synthetic`."""
    if list(source) == [SYNTHETIC]:
        return "storybook"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", _stem(source)).strip("-.") or "text"


def open_documents(paths: Sequence[str]) -> Iterable[DocumentPiece]:
    """Documents of some files and folders, read again at each iteration. Logs skipped files.

    Raises:
        UserError: if a file or folder does not exist.
    """
    return _make_file_documents(_expand_names(paths))


def _stem(source: Sequence[str]) -> str:
    first_name = source[0] if source else ""
    if first_name.startswith(hub.HUB_PREFIX):
        return first_name.removeprefix(hub.HUB_PREFIX)
    path, column = _split_column(first_name)
    return path.stem if column == DEFAULT_COLUMN else f"{path.stem}-{column}"


def _is_name_character(character: str) -> bool:
    """Whether a character is kept in a name: letters with their marks, digits, and `._-`."""
    return (
        character.isalnum() or character in "._-" or unicodedata.category(character).startswith("M")
    )


def _short_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _make_file_documents(path_columns: Sequence[tuple[Path, str]]) -> _FileDocuments:
    return _FileDocuments(
        FileRows([path for path, _ in path_columns]), columns=[column for _, column in path_columns]
    )


def _open_hub_source(name: str, dataset: HubDataset) -> Source:
    rows = hub.load_hub_rows(dataset)
    revision = {"revision": rows.revision} if rows.revision else {}
    return Source(
        name,
        {**hub.hub_origin(dataset), **revision},
        _FileDocuments(rows.train, dataset.column, dataset.single),
        _FileDocuments(rows.val, dataset.column, dataset.single) if rows.val else None,
        sum(map(readers.estimate_text_bytes, rows.train.paths)),
        dataset.single,
    )


def _open_file_source(
    source: Sequence[str], val_source: Sequence[str], hash_cache: HashCache | None
) -> Source:
    train, val = _expand_names(source), _expand_names(val_source)
    paths, val_paths = [path for path, _ in train], [path for path, _ in val]

    def build_origin(kind: str, names: Sequence[str], paths: Sequence[Path]) -> dict[str, Any]:
        def compute_entry() -> dict[str, Any]:
            return {"paths": _absolute_paths(names), "sha256": _hash_files(paths)}

        entry = (
            hash_cache.get_or_compute(kind, paths, compute_entry) if hash_cache else compute_entry()
        )
        return _origin_fields(kind, names, entry["sha256"])

    origin = build_origin("files", source, paths)
    if val_paths:
        origin |= build_origin("val_files", val_source, val_paths)
    return Source(
        data_folder_name(source),
        origin,
        _make_file_documents(train),
        _make_file_documents(val) if val else None,
        sum(map(readers.estimate_text_bytes, paths)),
    )


def _origin_fields(kind: str, names: Sequence[str], sha256: str) -> dict[str, Any]:
    """Entries of some files in an origin; `kind` is "files" or "val_files"."""
    return {kind: [Path(name).name for name in names], kind.replace("files", "sha256"): sha256}


def _absolute_paths(names: Sequence[str]) -> list[str]:
    return [str(files.expand_user(name).absolute()) for name in names]


def _split_column(name: str) -> tuple[Path, str]:
    """Split `FILE` or `FILE:COLUMN` into the path and the column with the documents."""
    path = files.expand_user(name)
    file_name, colon, column = name.rpartition(":")
    if not colon or not column or files.lexists(path):
        return path, DEFAULT_COLUMN
    table_path = files.expand_user(file_name)
    is_table = table_path.suffix.lower() in readers.TABLE_READERS or files.exists(table_path)
    return (table_path, column) if is_table else (path, DEFAULT_COLUMN)


def _hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of one file, or of the hashes of several files."""
    try:
        digests = [files.sha256_file(path) for path in paths]
    except OSError as error:
        raise files.to_user_error(error, "read", paths[0]) from error
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _expand_names(names: Sequence[str]) -> list[tuple[Path, str]]:
    """Expand source names to files, each with the column that contains its documents."""
    path_columns = [path_column for name in names for path_column in _match_files(name)]
    notices = (notice for path, _ in path_columns if (notice := formats.markup_notice(path)))
    for notice in itertools.islice(notices, 1):
        logger.info(notice)
    return path_columns


CORPORA = (*hub.HUB_DATASETS, SYNTHETIC)


def _match_files(name: str) -> list[tuple[Path, str]]:
    path, column = _split_column(name)
    if files.is_folder(path):
        paths = folders.find_text_files(path, readers.FOLDER_SUFFIXES)
        if not paths:
            raise UserError(
                f"no {', '.join(readers.FOLDER_SUFFIXES)} files found in {name}",
                "specify the files themselves.",
            )
    elif files.is_file(path):
        paths = [path]
    elif files.exists(path):
        raise UserError(f"{name} is not a regular file", "write its output to a file first.")
    elif path.is_symlink():
        raise UserError(
            f"{name} is a broken link: {path.readlink()} does not exist",
            "restore its target, or specify the file itself.",
        )
    elif glob.has_magic(str(path)):  # not expanded by a shell: quoted, or from Python
        matches = folders.expand_pattern(path)
        if not matches:
            raise UserError(f"no file matches {name!r}", "use a path that exists.")
        paths = [p for p in matches if files.is_file(p) and not folders.is_ignored(p.name)]
    else:
        raise UserError(
            f"no file, folder or dataset named {name!r}",
            f"use a path that exists, or one of {', '.join(CORPORA)}.",
        )
    return [(path, column) for path in paths]
