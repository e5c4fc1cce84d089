"""Texts of the Hugging Face hub, through `datasets`: those that we know by name, and any other as
`hf:owner/name` or `hf:owner/name:column`.

What lies in a cache is used without asking. A text whose hash is pinned is the same for everybody,
wherever it comes from, and may have another place to come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlxgpt import files
from mlxgpt.corpus import readers, web
from mlxgpt.corpus.readers import COLUMN
from mlxgpt.errors import UserError

PREFIX = "hf:"
# Where the hub keeps a copy in Parquet of what is not, such as what a script of the dataset's own
# would make, which `datasets` no longer runs.
CONVERTED = "refs/convert/parquet"
Span = tuple[int, int | None]  # rows from one on, up to another
ALL: Span = (0, None)


@dataclass(frozen=True)
class Elsewhere:
    """Another place of a text.

    Attributes:
        url: of the text alone.
        cut: how many of its characters are for training; the others are for validation.
    """

    url: str
    cut: int


@dataclass(frozen=True)
class HubText:
    """A dataset on the hub, and which of its rows serve for what.

    Attributes:
        path: its owner and name.
        train, val: splits, several as `a+b`. Without one for validation, a part of `train` is
            held out.
        train_rows, val_rows: which of their rows.
        column: the one that holds the documents.
        tokenizer: the usual one for it.
        single: whether the rows are pieces of one document.
        megabytes: of text, about; 0: unknown.
        sha256: of all the text, where that is known.
        elsewhere: where else it is.
    """

    path: str
    train: str = "train"
    val: str | None = "validation"
    train_rows: Span = ALL
    val_rows: Span = ALL
    column: str = COLUMN
    tokenizer: str = "bpe"
    single: bool = False
    megabytes: int = 0
    sha256: str | None = None
    elsewhere: Elsewhere | None = None


HUB = {
    "shakespeare": HubText(
        path="karpathy/tiny_shakespeare",
        val="validation+test",  # joined they are nanoGPT's last 10 %
        tokenizer="char",
        single=True,
        megabytes=1,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        elsewhere=Elsewhere(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
            "input.txt",
            cut=1_003_854,  # characters of the hub's `train`
        ),
    ),
    "tinystories": HubText(path="roneneldan/TinyStories", megabytes=1900),
    # By GPT-4 only, and cleaned. There is one split; its card says which rows are which: before
    # the validation rows come 10,000 for a test, which nothing here looks at.
    "tinystories-gpt4": HubText(
        path="karpathy/tinystories-gpt4-clean",
        val="train",
        train_rows=(20_000, None),
        val_rows=(10_000, 20_000),
        megabytes=2200,
    ),
    # A copy that is plain Parquet files: the original is a script.
    "openwebtext": HubText(
        path="vietgpt/openwebtext_en", val=None, tokenizer="gpt2", megabytes=38_000
    ),
}


class Unavailable(UserError):
    """A text cannot be had: where it is says nothing, says no, or gives another one."""


@dataclass(frozen=True)
class Rows:
    """Files whose rows are documents, and which of these, counted over all the files."""

    paths: Sequence[Path]
    span: Span = ALL


@dataclass(frozen=True)
class Found:
    """A text at hand.

    Attributes:
        train, val: the rows for training and for validation; None: a part of `train`.
        revision: the hub's name for this state of the dataset; None if it came from elsewhere.
    """

    train: Rows
    val: Rows | None
    revision: str | None = None


def named(source: str) -> HubText | None:
    """The text of the hub that a source names; None if it names none.

    Raises:
        UserError: if it begins as one, and goes on otherwise.
    """
    if not source.startswith(PREFIX):
        return HUB.get(source)
    parts = re.fullmatch(r"hf:(?P<path>[\w.-]+/[\w.-]+)(:(?P<column>.+))?", source)
    if not parts:
        raise UserError(
            f"{source!r} is no dataset's name", "write hf:OWNER/NAME, or hf:OWNER/NAME:COLUMN."
        )
    return HubText(parts["path"], column=parts["column"] or COLUMN)


def origin(text: HubText) -> dict[str, Any]:
    """The origin of a text of the hub, known without reaching it."""
    known: dict[str, Any] = {"hub": text.path}
    if text.column != COLUMN:
        known["column"] = text.column
    return known | ({"sha256": text.sha256} if text.sha256 else {})


def load(text: HubText, note: Callable[[str], None]) -> Found:
    """The rows of a text of the hub; they stay in a cache.

    Args:
        note: takes a line on what is being done.

    Raises:
        Unavailable: if it is in no cache, and cannot be had.
        UserError: if the dataset has no such split or column.
    """
    _be_quiet()
    if found := _cached(text):
        return found
    size = f" ({text.megabytes:,} MB of text)" if text.megabytes else ""
    note(f"getting {text.path}{size} from the Hugging Face hub")
    try:
        return _from_hub(text, note)
    except Exception as error:  # datasets lets through whatever its transports raise
        _raise_disk_error(error)
        if isinstance(error, UserError) and not text.elsewhere:
            raise
        problem, remedy = f"the Hugging Face hub: {web.reason(error)}", _remedy(error)
    if text.elsewhere:
        host = urlsplit(text.elsewhere.url).hostname
        note(f"{problem}; getting the same text from {host}")
        try:
            return _from_elsewhere(text, text.elsewhere)
        except Exception as error:
            _raise_disk_error(error)
            problem += f"; {host}: {web.reason(error)}"
    raise Unavailable(f"{text.path} cannot be had ({problem})", remedy)


def _raise_disk_error(error: Exception) -> None:
    """Raise a failing disk's error: the next place to get the text from would fail, too."""
    if broken := web.disk_error(error):
        from datasets import config

        raise files.os_error(broken, "use", Path(config.HF_DATASETS_CACHE)) from error


def _cached(text: HubText) -> Found | None:
    """The text from a cache: that of `datasets`, or ours of what came from elsewhere."""
    with web.offline():
        try:
            return _found(text, _dataset(text))
        except Exception as error:  # it is not there, or damaged, or another text
            _raise_disk_error(error)
            if isinstance(error, UserError) and not text.elsewhere:
                raise
    with contextlib.suppress(FileNotFoundError, UserError, web.Trouble):
        return _checked(text, _kept_elsewhere(text)) if text.elsewhere else None
    return None


def _from_hub(text: HubText, note: Callable[[str], None]) -> Found:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise web.NoAnswer("HF_HUB_OFFLINE is set")
    web.must_answer(f"{constants.ENDPOINT}/api/datasets/{text.path}", note)
    with contextlib.ExitStack() as stack:
        stack.enter_context(web.patience(note, tries_again=text.elsewhere is None))
        if text.elsewhere:  # Xet, which is worth it for large files only, may stall
            stack.enter_context(web.without_xet())
        try:
            dataset = _dataset(text)
        except Exception as error:
            if not web.through_xet(error):
                raise
            note(f"the hub's Xet storage failed ({web.reason(error)}); once more without it")
            with web.without_xet():
                dataset = _dataset(text)
    return _found(text, dataset)


def _from_elsewhere(text: HubText, place: Elsewhere) -> Found:
    content = web.fetch(place.url, longest=2_000_000 * text.megabytes)
    _must_be(text, hashlib.sha256(content))
    whole = content.decode("utf-8")
    rows = _kept_elsewhere(text)
    for path, part in zip(_paths(rows), (whole[: place.cut], whole[place.cut :]), strict=True):
        files.write_atomically(path, part)
    return rows


def _kept_elsewhere(text: HubText) -> Found:
    """Where a text that did not come from the hub is kept."""
    folder = web.cache_folder(text.path)
    return Found(Rows([folder / "train.txt"]), Rows([folder / "val.txt"]))


def _dataset(text: HubText) -> Any:
    """All splits of a dataset, from the same state of it."""
    import datasets  # slow to import: only where it is used

    path = f"hf://datasets/{text.path}"  # never a folder here of the same name
    try:
        return datasets.load_dataset(path)
    except RuntimeError as error:
        if web.through_xet(error):
            raise
        # `datasets` has found a script, which it no longer runs, nor would we.
        return datasets.load_dataset(path, revision=CONVERTED)


def _found(text: HubText, dataset: Any) -> Found:
    """The rows of a loaded dataset; raises UserError where it has no such split or column."""
    splits = list(dataset)
    train = splits[0] if len(splits) == 1 else text.train
    val = text.val if text.val and set(text.val.split("+")) <= set(splits) else None
    if train not in splits:
        raise UserError(
            f"{text.path} has no split 'train'; there is: {', '.join(splits)}",
            "download the files that you mean, and name these.",
        )
    columns = dataset[train].features
    if str(getattr(columns.get(text.column), "dtype", None)) not in ("string", "large_string"):
        texts = [name for name, kind in columns.items() if "string" in str(kind)]
        raise UserError(
            f"{text.path} has no column {text.column!r} of text; there is: "
            f"{', '.join(texts) or 'none'}",
            f"name the one that holds the documents: {PREFIX}{text.path}:COLUMN.",
        )

    def paths(names: str) -> list[Path]:
        return [Path(f["filename"]) for name in names.split("+") for f in dataset[name].cache_files]

    found = Found(
        Rows(paths(train), text.train_rows),
        Rows(paths(val), text.val_rows) if val else None,
        paths(train)[0].parent.name,  # the cache's folders are named so
    )
    return _checked(text, found)


def _checked(text: HubText, found: Found) -> Found:
    """`found` itself, if it is the text that it has to be."""
    if text.sha256:
        digest = hashlib.sha256()
        for path in _paths(found):
            for piece in readers.read(path, text.column):
                digest.update(piece.text.encode("utf-8"))
        _must_be(text, digest)
    return found


def _must_be(text: HubText, digest: hashlib._Hash) -> None:
    if digest.hexdigest() != text.sha256:
        raise web.Trouble(f"another text, sha256 {digest.hexdigest()[:8]}…")


def _paths(found: Found) -> Iterator[Path]:
    for rows in (found.train, found.val):
        yield from rows.paths if rows else ()


def _be_quiet() -> None:
    """Errors are told by us; progress only where there is a terminal."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()


def _refused(error: Exception) -> bool:
    """Whether the hub knows no such dataset, or keeps it from us; it does not always tell which."""
    from datasets.exceptions import DatasetNotFoundError

    return isinstance(error, DatasetNotFoundError) or web.status(error) in (401, 403, 404)


def _remedy(error: Exception) -> str:
    other = "train on your own text, --source FILE, or on the built-in stories, --source storybook."
    if _refused(error):
        return "check the name; what is private or gated needs: hf auth login."
    if web.status(error) == 429:
        return f"wait some minutes, or log in, with hf auth login; or {other}"
    if isinstance(error, web.NoAnswer):
        return f"check the connection; or {other}"
    if isinstance(error, OSError) and error.errno in files.REMEDIES:
        return files.REMEDIES[error.errno]
    if isinstance(error, ValueError):  # such as several configurations to choose from
        return "download the files that you mean, and name these."
    return f"try again later; or {other}"
