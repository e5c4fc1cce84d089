"""Hugging Face Hub datasets, loaded with `datasets`: some by a short name, any other as
`hf:owner/name` or `hf:owner/name:column`.

A dataset is loaded from the first place that has it: the cache (without a request to the Hub), the
Hub, or a mirror. Text with a pinned hash is the same from each.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlxgpt.data import http, readers
from mlxgpt.data.readers import DEFAULT_COLUMN
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
RowRange = tuple[int, int | None]  # (first row, end row or None)
ALL_ROWS: RowRange = (0, None)


@dataclass(frozen=True)
class Mirror:
    """An alternative download of a dataset.

    Attributes:
        url: URL of the whole text.
        train_characters: characters for training; the rest is for validation.
    """

    url: str
    train_characters: int


@dataclass(frozen=True)
class HubDataset:
    """A Hub dataset, and which of its rows are for training and validation.

    Attributes:
        repo_id: OWNER/NAME.
        train, val: names of splits, several as `a+b`. Without `val`, a part of `train` is held out.
        train_rows, val_rows: rows of these splits to use.
        column: column with the documents.
        tokenizer: default tokenizer.
        single: whether the rows are pieces of one document.
        megabytes: approximate size of the text in MB; 0: unknown.
        sha256: pinned hash of the whole text, if any.
        mirror: alternative download of the same text.
    """

    repo_id: str
    train: str = "train"
    val: str | None = "validation"
    train_rows: RowRange = ALL_ROWS
    val_rows: RowRange = ALL_ROWS
    column: str = DEFAULT_COLUMN
    tokenizer: str = "bpe"
    single: bool = False
    megabytes: int = 0
    sha256: str | None = None
    mirror: Mirror | None = None


HUB_DATASETS = {
    "shakespeare": HubDataset(
        repo_id="karpathy/tiny_shakespeare",
        val="validation+test",  # together they are nanoGPT's last 10%
        tokenizer="char",
        single=True,
        megabytes=1,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        mirror=Mirror(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
            "input.txt",
            train_characters=1_003_854,  # as in the Hub's `train` split
        ),
    ),
    "tinystories": HubDataset(repo_id="roneneldan/TinyStories", megabytes=1900),
    # It has one split; its card reserves the first 10,000 rows for a test set, unused here.
    "tinystories-gpt4": HubDataset(
        repo_id="karpathy/tinystories-gpt4-clean",
        val="train",
        train_rows=(20_000, None),
        val_rows=(10_000, 20_000),
        megabytes=2200,
    ),
    # A copy as plain Parquet files: the original has a loading script.
    "openwebtext": HubDataset(
        repo_id="vietgpt/openwebtext_en", val=None, tokenizer="gpt2", megabytes=38_000
    ),
}


class DatasetUnavailableError(UserError):
    """A dataset could not be downloaded from any of its sources."""


@dataclass(frozen=True)
class FileRows:
    """Files whose rows are documents, and a range of rows, counted across all files."""

    paths: Sequence[Path]
    row_range: RowRange = ALL_ROWS


@dataclass(frozen=True)
class SplitRows:
    """Rows of a downloaded dataset.

    Attributes:
        train, val: rows for training and validation; without `val`, split from `train`.
        revision: commit of the dataset on the Hub; None for a mirror.
    """

    train: FileRows
    val: FileRows | None
    revision: str | None = None

    @property
    def paths(self) -> list[Path]:
        """The files of both splits."""
        return [*self.train.paths, *(self.val.paths if self.val else ())]


def find_hub_dataset(source: str) -> HubDataset | None:
    """The Hub dataset that a source names; None if it names none.

    Raises:
        UserError: if it starts with `hf:` and is not hf:OWNER/NAME or hf:OWNER/NAME:COLUMN.
    """
    if not source.startswith(HUB_PREFIX):
        return HUB_DATASETS.get(source)
    match = re.fullmatch(r"hf:(?P<path>[\w.-]+/[\w.-]+)(:(?P<column>.+))?", source)
    if not match:
        raise UserError(
            f"{source!r} is not a valid dataset name", "use hf:OWNER/NAME or hf:OWNER/NAME:COLUMN."
        )
    return HubDataset(match["path"], column=match["column"] or DEFAULT_COLUMN)


def hub_origin(dataset: HubDataset) -> dict[str, Any]:
    """Origin of a Hub dataset, as far as known without a request to the Hub."""
    fields: dict[str, Any] = {"hub": dataset.repo_id}
    if dataset.column != DEFAULT_COLUMN:
        fields["column"] = dataset.column
    return fields | ({"sha256": dataset.sha256} if dataset.sha256 else {})


def load_hub_rows(dataset: HubDataset) -> SplitRows:
    """Load the rows of a Hub dataset from the cache, or download them.

    Raises:
        DatasetUnavailableError: if it could not be downloaded from the Hub or a mirror.
        UserError: if the dataset has no such split or column.
    """
    _configure(show_warnings=dataset.mirror is None)
    if rows := _load_from_cache(dataset):
        return rows
    size = f" ({dataset.megabytes:,} MB of text)" if dataset.megabytes else ""
    logger.info(f"downloading {dataset.repo_id}{size} from the Hugging Face hub")
    try:
        if dataset.mirror:
            return http.run_with_timeout(
                http.MIRROR_TIMEOUT_SECONDS, lambda: _load_from_hub(dataset)
            )
        return _load_from_hub(dataset)
    except Exception as error:  # `datasets` passes on all errors of its transports
        _raise_disk_error(error)
        if isinstance(error, UserError) and not dataset.mirror:
            raise
        problem = f"the Hugging Face hub: {http.describe_download_error(error)}"
        remedy = _download_remedy(error)
    if dataset.mirror:
        host = urlsplit(dataset.mirror.url).hostname
        logger.info(f"{problem}; downloading the same dataset from {host}")
        try:
            return _download_from_mirror(dataset, dataset.mirror)
        except Exception as error:
            _raise_disk_error(error)
            problem += f"; {host}: {http.describe_download_error(error)}"
    raise DatasetUnavailableError(f"{dataset.repo_id} could not be downloaded ({problem})", remedy)


def _configure(*, show_warnings: bool) -> None:
    """Silence the libraries' logs, and hide their progress bars outside a terminal."""
    import datasets  # slow to import

    http.configure_hub(show_warnings=show_warnings)
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _raise_disk_error(error: Exception) -> None:
    """Raise UserError if a failing or full disk is the cause: a mirror would not help."""
    from datasets import config

    http.raise_disk_error(error, Path(config.HF_DATASETS_CACHE))


def _load_from_cache(dataset: HubDataset) -> SplitRows | None:
    """Load the rows from the cache of `datasets`, or from the cached text of the mirror."""
    with http.force_offline():
        try:
            return _split_rows(dataset, _load_splits(dataset))
        except Exception as error:  # not cached, damaged, or different text
            _raise_disk_error(error)
            if isinstance(error, UserError) and not dataset.mirror:
                raise
    with contextlib.suppress(FileNotFoundError, UserError, http.DownloadError):
        return _verify_rows(dataset, _mirror_cache_rows(dataset)) if dataset.mirror else None
    return None


def _load_from_hub(dataset: HubDataset) -> SplitRows:
    from huggingface_hub import HfApi

    # Fail early: without a connection, `datasets` retries for minutes.
    HfApi().dataset_info(dataset.repo_id, timeout=http.response_timeout())
    return _split_rows(dataset, _load_splits(dataset))


def _download_from_mirror(dataset: HubDataset, mirror: Mirror) -> SplitRows:
    content = http.download_bytes(mirror.url, max_bytes=2_000_000 * dataset.megabytes)
    _check_hash(dataset, hashlib.sha256(content))
    text, end = content.decode("utf-8"), mirror.train_characters
    rows = _mirror_cache_rows(dataset)
    for path, text_part in zip(rows.paths, (text[:end], text[end:]), strict=True):
        files.write_atomically(path, text_part)
    return rows


def _mirror_cache_rows(dataset: HubDataset) -> SplitRows:
    """Cache files for the text of a mirror."""
    folder = http.download_cache_folder(dataset.repo_id)
    return SplitRows(FileRows([folder / "train.txt"]), FileRows([folder / "val.txt"]))


PARQUET_REVISION = "refs/convert/parquet"  # the hub's Parquet copy of script datasets


def _load_splits(dataset: HubDataset) -> Any:
    """Load all splits of a dataset, from the same commit."""
    import datasets

    path = f"hf://datasets/{dataset.repo_id}"  # never a local folder of that name
    try:
        return datasets.load_dataset(path)
    except RuntimeError as error:
        if http.is_xet_error(error):
            raise
        # The dataset has a loading script, which `datasets` does not run.
        return datasets.load_dataset(path, revision=PARQUET_REVISION)


def _split_rows(dataset: HubDataset, splits: Any) -> SplitRows:
    """Select the rows of loaded splits; raises UserError if a split or column is missing."""
    names = list(splits)
    train = names[0] if len(names) == 1 else dataset.train
    val = dataset.val if dataset.val and set(dataset.val.split("+")) <= set(names) else None
    if train not in names:
        raise UserError(
            f"{dataset.repo_id} has no split 'train'; available: {', '.join(names)}",
            "download the files you need, and use them as --source.",
        )
    columns = splits[train].features
    if str(getattr(columns.get(dataset.column), "dtype", None)) not in ("string", "large_string"):
        text_columns = [name for name, feature in columns.items() if "string" in str(feature)]
        raise UserError(
            f"{dataset.repo_id} has no text column {dataset.column!r}; available: "
            f"{', '.join(text_columns) or 'none'}",
            f"specify the text column: {HUB_PREFIX}{dataset.repo_id}:COLUMN",
        )

    def split_paths(split: str) -> list[Path]:
        return [
            Path(cache_file["filename"])
            for name in split.split("+")
            for cache_file in splits[name].cache_files
        ]

    rows = SplitRows(
        FileRows(split_paths(train), dataset.train_rows),
        FileRows(split_paths(val), dataset.val_rows) if val else None,
        split_paths(train)[0].parent.name,  # the cache names its folders by revision
    )
    return _verify_rows(dataset, rows)


def _verify_rows(dataset: HubDataset, rows: SplitRows) -> SplitRows:
    """Return `rows` after checking them against the pinned hash, if there is one."""
    if dataset.sha256:
        digest = hashlib.sha256()
        for path in rows.paths:
            for piece in readers.read_documents(path, dataset.column):
                digest.update(piece.text.encode("utf-8"))
        _check_hash(dataset, digest)
    return rows


def _check_hash(dataset: HubDataset, digest: hashlib._Hash) -> None:
    if digest.hexdigest() != dataset.sha256:
        raise http.DownloadError(f"the content has changed, sha256 {digest.hexdigest()[:8]}…")


def _download_remedy(error: Exception) -> str:
    alternative = (
        "train on your own data, --source FILE, or on synthetic stories, --source synthetic."
    )
    # The hub does not always distinguish missing datasets from private ones.
    is_not_found = type(error).__name__ == "DatasetNotFoundError"
    if is_not_found or http.http_status(error) in (401, 403, 404):
        return "check the name; for private or gated datasets, log in: hf auth login"
    if http.http_status(error) == 429:
        return f"wait a few minutes, or log in with hf auth login; or {alternative}"
    if http.is_unreachable(error):
        return f"check the connection; or {alternative}"
    if http.is_xet_error(error):
        return f"disable the hub's Xet storage: set HF_HUB_DISABLE_XET=1; or {alternative}"
    if isinstance(error, OSError) and error.errno in files.REMEDIES:
        return files.REMEDIES[error.errno]
    if isinstance(error, ValueError):  # such as several configurations to choose from
        return "download the files you need, and use them as --source."
    return f"try again later; or {alternative}"
