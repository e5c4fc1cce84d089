"""Where documents come from: text files and folders, the Hugging Face hub, the storybook.

A source is two re-iterable collections of documents, one to train on and one to judge by, and a
note on their origin. It knows nothing of tokens.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.corpus import hub, storybook
from mlxgpt.corpus.tokenizer import END_OF_TEXT
from mlxgpt.errors import UserError

VAL_SHARE = 0.1  # of a single document: its end
VAL_DOCUMENTS = 100  # of many: one in so many, chosen by content
VAL_SHARE_STORIES = 0.01  # of the storybook's length, in stories of their own


@dataclass(frozen=True)
class Source:
    """Documents to train on and to judge by.

    Attributes:
        name: a short name, for the data folder.
        origin: what meta.json records of it; equal origins mean equal text.
        train, val: the documents of each side.
        single: whether both sides are pieces of one document, with no end-of-text between.
    """

    name: str
    origin: dict[str, Any]
    train: Iterable[str]
    val: Iterable[str]
    single: bool


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
        UserError: if something is missing, unreadable, no UTF-8, or holds no text.
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
        return Source(name, corpus_origin(name, megabytes), train, val, single=False)
    if name:
        return Source(name, hub.origin(name), *hub.load(name), hub.HUB[name].single)
    return _from_files(source, val_source)


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

    def __iter__(self) -> Iterator[str]:
        return storybook.stories(self.seed, size=self.size)


def source_name(source: Sequence[str]) -> str:
    """The data folder's name for a source: the corpus, or the first path's stem."""
    stem = Path(source[0]).stem if source else ""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "text"


def read_documents(paths: Sequence[str]) -> tuple[list[str], str]:
    """All documents of some text files and folders of *.txt, and the sha256 of their bytes.

    A file is one document, or several with `<|endoftext|>` between them.
    """
    documents: list[str] = []
    digest = hashlib.sha256()
    for path in _expand(paths):
        content = _read(path)
        digest.update(content)
        if (nul := content.find(b"\0")) >= 0:
            raise UserError(
                f"{path} is no text: byte {nul:,} is NUL",
                "give a text file; UTF-16 is converted by: iconv -f utf-16 -t utf-8 FILE > NEW",
            )
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text (byte {error.start:,})",
                "convert it, for instance: iconv -f latin1 -t utf-8 FILE > NEW",
            ) from error
        parts = text.split(END_OF_TEXT)
        documents += [part for part in parts if part.strip()]
    if not documents:
        raise UserError(f"there is no text in {', '.join(paths)}", "give files that are not empty.")
    return documents, digest.hexdigest()


def _from_files(source: Sequence[str], val_source: Sequence[str]) -> Source:
    documents, digest = read_documents(source)
    origin: dict[str, Any] = {"files": [Path(p).name for p in source], "sha256": digest}
    if val_source:
        val, val_digest = read_documents(val_source)
        origin["val_files"] = [Path(p).name for p in val_source]
        origin["val_sha256"] = val_digest
        held_out = {_key(d) for d in val}
        train = [d for d in documents if _key(d) not in held_out]
        if not train:
            raise UserError(
                "every training document is in the validation text too",
                "give --source and --val-source different texts.",
            )
        single = len(train) == len(val) == 1
    elif len(documents) == 1:
        text = documents[0]
        cut = int(len(text) * (1 - VAL_SHARE))
        train, val, single = [text[:cut]], [text[cut:]], True
    else:
        train, val, single = *_split_by_content(documents), False
    if not single:
        train, val = [d.strip("\r\n") for d in train], [d.strip("\r\n") for d in val]
    return Source(source_name(source), origin, train, val, single)


def _split_by_content(documents: list[str]) -> tuple[list[str], list[str]]:
    """One document in a hundred, and at least one, to judge by. The choice hangs on the content
    alone, so that duplicates stay on one side.
    """
    keys = [_key(d) for d in documents]
    chosen = {k for k in keys if int(k, 16) % VAL_DOCUMENTS == 0} or {min(keys)}
    train = [d for d, k in zip(documents, keys, strict=True) if k not in chosen]
    if not train:
        raise UserError(
            "all documents are the same, so none is left to judge by",
            "give a text with more than one document, or --val-source.",
        )
    return train, [d for d, k in zip(documents, keys, strict=True) if k in chosen]


def _key(document: str) -> str:
    return hashlib.sha256(document.strip("\r\n").encode("utf-8")).hexdigest()


def _expand(paths: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(path.rglob("*.txt"))
            if not inside:
                raise UserError(f"no .txt file in the folder {name}", "name the files themselves.")
            files += inside
        elif path.exists():
            files.append(path)
        elif glob.has_magic(name):  # in quotes, or in Python, no shell has expanded it
            matching = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matching:
                raise UserError(f"no file matches {name!r}", "give a path that exists.")
            files += [match for match in matching if match.is_file()]
        else:
            raise UserError(
                f"there is no file, folder or corpus {name!r}",
                f"give a path that exists, or one of {', '.join(CORPORA)}.",
            )
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "check the file and its permissions."
        ) from error
