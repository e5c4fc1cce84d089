"""Prepares documents as token arrays: streamed, on all cores, in bounded memory.

A data folder appears complete or not at all. An interrupted preparation resumes, and ends with the
same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlxgpt import __version__
from mlxgpt import config as configs
from mlxgpt.config import DataConfig
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.data import sources
from mlxgpt.data.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.meta import META_FORMAT_VERSION, SPLITS, DatasetMeta, SplitMeta, read_meta
from mlxgpt.data.normalize import normalize_unicode
from mlxgpt.data.sources import Source, resolve_hub_dataset
from mlxgpt.data.splits import (
    MAX_VAL_FRACTION,
    SplitRule,
    assign_splits,
    drop_blank_documents,
    scan_source,
)
from mlxgpt.data.token_array import dtype_for, scan_token_file
from mlxgpt.data.tokenize import encode_pieces
from mlxgpt.data.tokenizers import bpe, tokenizer_json
from mlxgpt.data.tokenizers.base import NUL, Tokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

META_FILENAME = "meta.json"

ProgressCallback = Callable[[str, int, int], None]  # (stage, bytes done, estimated total bytes)


@dataclass(frozen=True)
class PrepareRequest:
    """A dataset to open or to prepare.

    Attributes:
        data: source, validation source, tokenizer. A source that is a prepared data folder, or
            the name of one in the folder for data, is opened as it is.
        vocab_size: of a BPE that is trained for it; 0: bpe.DEFAULT_VOCAB_SIZE.
        strict: refuse a text that gives a smaller vocabulary.
        name: the folder's name; default: the corpus or the first file's stem, and the tokenizer.
        megabytes: length of the synthetic stories; default: of those prepared already, or
            sources.SYNTHETIC_MEGABYTES.
        tokenizer: an existing one, instead of one by `data` and `vocab_size`.
        verify: read arrays and files again that were read before, and did not change since.
    """

    data: DataConfig
    vocab_size: int = 0
    strict: bool = False
    name: str | None = None
    megabytes: float | None = None
    tokenizer: Tokenizer | None = None
    verify: bool = False

    @property
    def tokenizer_kind(self) -> str:
        """The tokenizer, as the data folder's name and origin have it: `char`, `gpt2`, `bpe4096`,
        `as-FINGERPRINT`.
        """
        if self.tokenizer and self.data.tokenizer != "gpt2":
            return f"as-{self.tokenizer.fingerprint[:8]}"
        if self.data.tokenizer == "bpe":
            return f"bpe{self.vocab_size or bpe.DEFAULT_VOCAB_SIZE}"
        return self.data.tokenizer

    def add_tokenizer_to_origin(self, origin: dict[str, Any]) -> dict[str, Any]:
        """A source's origin, with the tokenizer unless it is `char`."""
        if self.tokenizer_kind == "char":
            return origin
        return {**origin, "tokenizer": self.tokenizer_kind}


def prepare(
    *source: PathLike,
    val_source: Sequence[PathLike] = (),
    name: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    megabytes: float | None = None,
    verify: bool = False,
    data_dir: PathLike | None = None,
    progress: ProgressCallback = lambda stage, done, total: None,
) -> Dataset:
    """Turn text into token arrays in DATA_DIR/NAME, or open them if they are there.

    Args:
        source: `shakespeare` (default), `tinystories`, `tinystories-gpt4`, `openwebtext`,
            `storybook`; a dataset of the hub, `hf:owner/name` or `hf:owner/name:column`; or files
            and folders: text, JSON, Parquet, Arrow; `FILE:COLUMN` for another column than `text`.
        val_source: validation text; default: a part of the source.
        name: the data folder's name; default: the corpus or the first file's stem, and the
            tokenizer.
        tokenizer: `char`, `bpe` or `gpt2`; default: `bpe` for stories and datasets of the hub, and
            where `vocab_size` is given; `gpt2` for openwebtext, else `char`.
        vocab_size: of a BPE; default: 4096.
        megabytes: length of the storybook; default: what is there, or 10.
        verify: read what is there whole, and compare it with its hashes, also where it was read
            before and did not change since.
        progress: is called with (stage, done, total), in bytes of text.
    """
    if tokenizer is None:
        hub_dataset = resolve_hub_dataset([str(name) for name in source])
        tokenizer = "bpe" if vocab_size else hub_dataset.tokenizer if hub_dataset else "char"
    elif vocab_size and tokenizer != "bpe":
        raise UserError(
            f"--tokenizer {tokenizer} does not support --vocab-size",
            "omit --vocab-size, or use --tokenizer bpe.",
        )
    values = {"source": source or DataConfig().source, "val_source": val_source}
    data_config = configs.config_from_tree({"data": {**values, "tokenizer": tokenizer}}).data
    request = PrepareRequest(
        data_config,
        vocab_size or 0,
        strict=vocab_size is not None,
        name=name,
        megabytes=megabytes,
        verify=verify,
    )
    dataset = find_or_prepare(request, resolve_folder("data", data_dir), progress)
    if verify:
        logger.info("verified: all checksums match")
    return dataset


def find_or_prepare(
    request: PrepareRequest,
    data_dir: Path,
    progress: ProgressCallback = lambda phase, done, total: None,
) -> Dataset:
    """Open the dataset of a request; prepare it first if it does not exist.

    Args:
        data_dir: the folder of data folders.
        progress: receives the phase, "reading" or "encoding", and how far it is.

    Raises:
        DatasetUnavailableError: if it is a dataset of the hub, and could not be downloaded.
        UserError: if the text is missing, or `name` already holds another one.
    """
    data = request.data
    sources.check_source_args(data.source, data.val_source, request.megabytes)
    if len(data.source) == 1 and not data.val_source and not sources.corpus_name(data.source):
        for folder in (Path(data.source[0]), data_dir / data.source[0]):
            if is_prepared(folder):
                return open_dataset(folder, verify=request.verify)
    if request.tokenizer_kind.startswith("bpe"):
        bpe.check_vocab_size(request.vocab_size or bpe.DEFAULT_VOCAB_SIZE)
    suffix = "" if request.tokenizer_kind == "char" else f"-{request.tokenizer_kind}"
    folder = (
        data_dir / request.name if request.name else _choose_folder(data_dir, data.source, suffix)
    )
    hash_cache = HashCache(folder, reread=request.verify)
    if files.exists(folder / META_FILENAME):
        if not _matches_request(folder, request, hash_cache):
            command = shlex.join(["mlxgpt", "prepare", *data.source, "--name", "NAME"])
            raise UserError(
                f"{folder} was prepared from different data or with a different tokenizer",
                f"choose another name: {command}, then --source {data_dir}/NAME",
            )
        hash_cache.save()
        return open_dataset(folder, verify=request.verify)
    source = sources.open_source(data.source, data.val_source, request.megabytes, hash_cache)
    source = replace(source, origin=request.add_tokenizer_to_origin(source.origin))
    if files.exists(folder) and not files.exists(folder / META_FILENAME):
        raise UserError(f"{folder} exists, but contains no prepared data", "choose another --name.")
    logger.info(f"preparing {', '.join(data.source)} in {folder}")
    with files.file_lock(folder, "preparing"):
        if not files.exists(folder / META_FILENAME):  # or another process was quicker
            _PrepareJob(source, request, folder, hash_cache, progress).run()
    return open_dataset(folder)


def _matches_request(folder: Path, request: PrepareRequest, hash_cache: HashCache) -> bool:
    """Whether a data folder was prepared from the text and with the tokenizer of a request."""
    data, megabytes = request.data, request.megabytes
    is_corpus = sources.corpus_name(data.source) is not None
    if is_corpus:  # its origin is known without downloading or generating it
        origin = sources.corpus_origin(data.source, megabytes)
    elif missing_origin := sources.origin_of_missing_files(
        data.source, data.val_source, hash_cache
    ):
        logger.info(
            f"{', '.join(data.source)} no longer exists; using {folder}, which was prepared from it"
        )
        origin = missing_origin
    else:
        origin = sources.open_source(data.source, data.val_source, megabytes, hash_cache).origin
    origin, prepared_origin = request.add_tokenizer_to_origin(origin), read_meta(folder).origin
    if is_corpus:  # compare only what the request specifies, and the tokenizer
        prepared_origin = {
            key: value for key, value in prepared_origin.items() if key in (*origin, "tokenizer")
        }
    return sources.canonicalize_origin(origin) == sources.canonicalize_origin(prepared_origin)


def _choose_folder(data_dir: Path, source: Sequence[str], suffix: str) -> Path:
    """The data folder for a source; its legacy name if these files were prepared under it."""
    folder = data_dir / (sources.data_folder_name(source) + suffix)
    legacy_folder = data_dir / (sources.legacy_data_folder_name(source) + suffix)
    if legacy_folder != folder and not files.exists(folder):
        with contextlib.suppress(UserError):
            if read_meta(legacy_folder).origin.get("files") == [Path(name).name for name in source]:
                return legacy_folder
    return folder


def encode_files(paths: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of some files' documents, each with its end-of-text. Logs what is skipped.

    Raises:
        UserError: if there is no text, or several documents and the tokenizer has no end-of-text.
    """
    has_end_of_text = tokenizer.end_of_text is not None
    texts = [""]
    for text, last in drop_blank_documents(sources.open_documents(paths)):
        texts[-1] += text
        if last:
            texts.append("")
    texts.pop()
    if not texts:
        raise UserError(f"no text found in {', '.join(paths)}", "use files that are not empty.")
    texts = [normalize_unicode(text, tokenizer) for text in texts]
    if has_end_of_text:
        texts = [text.strip("\r\n") for text in texts]
    elif len(texts) > 1:
        raise UserError(
            "this run was trained on a single document, but the source contains several",
            "use one text file without <|endoftext|>.",
        )
    return tokenizer.encode_documents(
        "".join(text + NUL if has_end_of_text else text for text in texts)
    )


UNFINISHED_FILENAME = "unfinished.json"
PROGRESS_FILENAME = "progress.json"
SAVE_EVERY_CHUNKS = 32  # chunks between two saves of the progress


class _PrepareJob:
    """The preparation of one data folder, in a scratch folder that is renamed when complete.

    unfinished.json has the origin, and the rule for the split; progress.json the lengths of the
    arrays. Both have a checksum, and are written after what they describe is on the disk. If
    meta.json exists and unfinished.json does not, only the rename is missing.
    """

    def __init__(
        self,
        source: Source,
        request: PrepareRequest,
        folder: Path,
        hash_cache: HashCache,
        progress: ProgressCallback,
    ) -> None:
        self.source, self.request, self.folder = source, request, folder
        self.hash_cache, self.progress = hash_cache, progress
        self.scratch_folder = folder.with_name(f".{folder.name}.new")
        self.counts = {split: SplitMeta(0, 0, 0, "") for split in SPLITS}
        self.chunks = 0

    def run(self) -> None:
        """Prepare the data folder, or resume its preparation."""
        try:
            if not self._is_complete():
                rule, tokenizer = self._resume() or self._start()
                self.dtype = dtype_for(tokenizer.vocab_size)
                self._encode(rule, tokenizer)
                self._finish(tokenizer)
            self._publish()
        except UserError:
            # The text or a setting is wrong: resumed, the same command would fail here again.
            self._discard()
            raise
        except BaseException:
            # An interrupt, a failing disk or a bug: what was saved is kept, as after a kill.
            with contextlib.suppress(OSError):  # of a disk that does not even list its files
                can_resume = any(
                    files.exists(self.scratch_folder / name)
                    for name in (UNFINISHED_FILENAME, META_FILENAME)
                )
                logger.info(
                    "run the same command again to resume from here"
                    if can_resume
                    else "run the same command again to start over: nothing was saved yet"
                )
                if not can_resume:
                    self._discard()
            raise
        files.fsync_path(self.folder.parent)

    def _discard(self) -> None:
        shutil.rmtree(self.scratch_folder, ignore_errors=True)

    def _identity(self) -> dict[str, Any]:
        # With the version, since another one may cut documents into other pieces.
        return {"format": META_FORMAT_VERSION, "version": __version__, "origin": self.source.origin}

    def _start(self) -> tuple[SplitRule, Tokenizer]:
        if files.exists(self.scratch_folder):
            shutil.rmtree(self.scratch_folder)
        self.counts, self.chunks = {split: SplitMeta(0, 0, 0, "") for split in SPLITS}, 0
        rule, trained_tokenizer = scan_source(
            self.source, self.request.tokenizer_kind, self._report_reading
        )
        if rule.tails:
            logger.info(
                "validation split: the last tenth of each document, since whole documents would "
                f"exceed {MAX_VAL_FRACTION:.0%} of the data"
            )
        tokenizer = self._check_vocab_size(
            self.request.tokenizer or trained_tokenizer or bpe.load_gpt2_tokenizer()
        )
        if tokenizer.end_of_text is None and not rule.single:
            raise UserError(
                "the tokenizer has no end-of-text token, but the source contains several documents",
                "use one text file without <|endoftext|>.",
            )
        self.scratch_folder.mkdir(parents=True)
        files.write_atomically(self.scratch_folder / "tokenizer.json", tokenizer.to_json())
        for split in SPLITS:
            with files.add_filename_to_errors(path := self.scratch_folder / f"{split}.bin"):
                path.touch()
        text = files.dump_checksummed({**self._identity(), "sharing": asdict(rule)})
        files.write_atomically(self.scratch_folder / UNFINISHED_FILENAME, text)
        return rule, tokenizer

    def _check_vocab_size(self, tokenizer: Tokenizer) -> Tokenizer:
        kind, size = self.request.tokenizer_kind, tokenizer.vocab_size
        requested_size = int(kind[3:]) if kind.startswith("bpe") else 0
        if size < requested_size:
            problem = (
                f"the data yields a vocabulary of only {size:,} tokens, not {requested_size:,}"
            )
            if self.request.strict:
                raise UserError(problem, f"use --vocab-size {size}, or more data.")
            logger.info(problem)
        return tokenizer

    def _is_complete(self) -> bool:
        """Whether an interrupted preparation of the same text lacks only the rename."""
        if files.exists(self.scratch_folder / UNFINISHED_FILENAME):
            return False
        if not files.exists(self.scratch_folder / META_FILENAME):
            return False
        with contextlib.suppress(UserError):  # a damaged meta.json
            return read_meta(self.scratch_folder).origin == self.source.origin
        return False

    def _resume(self) -> tuple[SplitRule, Tokenizer] | None:
        """Load an interrupted preparation of the same text; None if there is none to resume.

        Raises:
            OSError: if it cannot be read. It stays: the next attempt may read it.
        """
        unfinished_path = self.scratch_folder / UNFINISHED_FILENAME
        progress_path = self.scratch_folder / PROGRESS_FILENAME
        if not files.exists(unfinished_path):
            return None
        try:
            tree = files.read_checksummed(unfinished_path, META_FORMAT_VERSION)
            if {key: tree[key] for key in self._identity()} != self._identity():
                raise ValueError("the data, a setting or mlxgpt has changed")
            tokenizer = tokenizer_json.load_tokenizer(self.scratch_folder / "tokenizer.json")
            if files.exists(progress_path):
                progress = files.read_checksummed(progress_path, META_FORMAT_VERSION)
                self.counts = {split: SplitMeta(**progress[split]) for split in SPLITS}
                self.chunks = progress["chunks"]
            itemsize = int(dtype_for(tokenizer.vocab_size)[-1])
            for split in SPLITS:
                path = self.scratch_folder / f"{split}.bin"
                n_bytes = itemsize * self.counts[split].tokens
                if path.stat().st_size < n_bytes:
                    raise ValueError(f"{path.name} is too short")
                os.truncate(path, n_bytes)
            rule = SplitRule(**tree["sharing"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, UserError) as error:
            reason = getattr(error, "problem", error)
            logger.info(f"cannot resume from {self.scratch_folder}, starting over: {reason}")
            return None
        if self.chunks:
            logger.info(f"resuming after {self._bytes_done / 1e6:,.0f} MB")
        return rule, self._check_vocab_size(tokenizer)

    @property
    def _bytes_done(self) -> int:
        return sum(count.bytes for count in self.counts.values())

    def _report_reading(self, done: int) -> None:
        self.progress("reading", done, self.source.size)

    def _encode(self, rule: SplitRule, tokenizer: Tokenizer) -> None:
        """Encode the missing chunks, and append them to the arrays."""
        with contextlib.ExitStack() as stack:
            arrays = {split: stack.enter_context(self._open_for_append(split)) for split in SPLITS}
            pieces = assign_splits(self.source, rule)
            encoded_chunks = encode_pieces(pieces, tokenizer, self.dtype, start=self.chunks)
            for chunk in stack.enter_context(contextlib.closing(encoded_chunks)):
                for split, (block, count) in chunk.items():
                    with files.add_filename_to_errors(self.scratch_folder / f"{split}.bin"):
                        arrays[split].write(block)
                    self.counts[split] = _add_counts(self.counts[split], count)
                self.chunks += 1
                self.progress("encoding", self._bytes_done, self.source.size)
                if self.chunks % SAVE_EVERY_CHUNKS == 0:
                    self._save(arrays)

    @contextlib.contextmanager
    def _open_for_append(self, split: str) -> Iterator[BinaryIO]:
        path = self.scratch_folder / f"{split}.bin"
        with files.add_filename_to_errors(path), path.open("ab") as array:  # closing it writes
            yield array

    def _save(self, arrays: dict[str, BinaryIO]) -> None:
        for split, array in arrays.items():
            with files.add_filename_to_errors(self.scratch_folder / f"{split}.bin"):
                array.flush()
            files.fsync_path(self.scratch_folder / f"{split}.bin")
        counts = {split: vars(count) for split, count in self.counts.items()}
        tree = {"format": META_FORMAT_VERSION, "chunks": self.chunks, **counts}
        files.write_atomically(
            self.scratch_folder / PROGRESS_FILENAME, files.dump_checksummed(tree)
        )

    def _finish(self, tokenizer: Tokenizer) -> None:
        split_metas = {}
        for split, count in self.counts.items():
            if not count.tokens:
                raise UserError(f"the {split} split is empty", "use more data.")
            split_metas[split] = replace(
                count, sha256=self._hash_array(self.scratch_folder / f"{split}.bin")
            )
        meta = DatasetMeta(
            META_FORMAT_VERSION,
            self.dtype,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            self.source.origin,
            **split_metas,
        )
        self.hash_cache.save(self.scratch_folder)
        files.write_atomically(self.scratch_folder / META_FILENAME, meta.to_json())
        for path in self.scratch_folder.iterdir():
            files.fsync_path(path)

    def _publish(self) -> None:
        for name in (UNFINISHED_FILENAME, PROGRESS_FILENAME):  # in this order, see `_is_complete`
            (self.scratch_folder / name).unlink(missing_ok=True)
        self.scratch_folder.rename(self.folder)

    def _hash_array(self, path: Path) -> str:
        """The sha256 of an array, also kept in the hash cache."""
        stats = self.hash_cache.get_or_compute(
            path.name, [path], lambda: scan_token_file(path, self.dtype)
        )
        return str(stats["sha256"])


def _add_counts(a: SplitMeta, b: SplitMeta) -> SplitMeta:
    return SplitMeta(a.tokens + b.tokens, a.documents + b.documents, a.bytes + b.bytes, "")
