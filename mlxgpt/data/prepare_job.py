"""Prepare a data folder: tokenize a source, streamed, on all cores, with bounded memory.

A data folder appears only when it is complete. An interrupted preparation resumes, and its result
has the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mlxgpt import __version__
from mlxgpt.config import DataConfig
from mlxgpt.data.examples import ExampleFormat
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.meta import META_FORMAT_VERSION, SPLITS, DatasetMeta, SplitMeta, read_meta
from mlxgpt.data.sources import Source
from mlxgpt.data.splits import (
    MAX_VAL_FRACTION,
    SplitRule,
    assign_splits,
    scan_source,
)
from mlxgpt.data.token_array import dtype_for, scan_token_file
from mlxgpt.data.tokenize import encode_pieces
from mlxgpt.data.tokenizers import bpe, tokenizer_json
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


META_FILENAME = "meta.json"


ProgressCallback = Callable[[str, int, int], None]  # (stage, bytes done, estimated total bytes)


@dataclass(frozen=True)
class PrepareRequest:
    """A dataset to open or to prepare.

    Attributes:
        data: source, validation source and tokenizer. The source may also be a prepared data
            folder, or the name of one in the data directory.
        vocab_size: vocabulary size of a BPE; 0: bpe.DEFAULT_VOCAB_SIZE.
        strict: raise an error if the text yields a smaller vocabulary.
        name: name of the data folder; default: the corpus or the first file's stem, plus the
            tokenizer.
        megabytes: size of the synthetic stories in MB; default: that of prepared ones, or
            sources.SYNTHETIC_MEGABYTES.
        tokenizer: an existing tokenizer, instead of the one set by `data` and `vocab_size`.
        verify: check the hashes of files and arrays, even if they have not changed.
        examples: how examples are encoded; None if the source consists of text.
    """

    data: DataConfig
    vocab_size: int = 0
    strict: bool = False
    name: str | None = None
    megabytes: float | None = None
    tokenizer: Tokenizer | None = None
    verify: bool = False
    examples: ExampleFormat | None = None

    @property
    def tokenizer_kind(self) -> str:
        """The tokenizer's name in the data folder's name and origin: `char`, `gpt2`, `bpe4096`,
        `as-FINGERPRINT`.
        """
        if self.tokenizer and self.data.tokenizer != "gpt2":
            return f"as-{self.tokenizer.fingerprint[:8]}"
        if self.data.tokenizer == "bpe":
            return f"bpe{self.vocab_size or bpe.DEFAULT_VOCAB_SIZE}"
        return self.data.tokenizer

    def add_tokenizer_to_origin(self, origin: dict[str, Any]) -> dict[str, Any]:
        """Add the tokenizer to the origin of a source, unless it is `char`."""
        if self.tokenizer_kind == "char":
            return origin
        return {**origin, "tokenizer": self.tokenizer_kind}


UNFINISHED_FILENAME = "unfinished.json"


PROGRESS_FILENAME = "progress.json"


SAVE_EVERY_CHUNKS = 32  # chunks between two saves of progress.json


class PrepareJob:
    """Preparation of one data folder in a scratch folder, which is renamed when complete.

    unfinished.json stores the origin and the split rule, progress.json the lengths of the arrays.
    Both have a checksum, and are written after the data they describe is on disk. If meta.json
    exists and unfinished.json does not, only the rename is missing.
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
            # The text or a setting is wrong: resuming would fail again.
            self._discard()
            raise
        except BaseException:
            # An interrupt, a failing disk or a bug: keep what was saved, as after a kill.
            with contextlib.suppress(OSError):  # the disk may fail again
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
        # Includes the version, since another one may split documents into other pieces.
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
        text = json_files.dump_checksummed({**self._identity(), "sharing": asdict(rule)})
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
            OSError: if it cannot be read. It is kept, since the next attempt may succeed.
        """
        unfinished_path = self.scratch_folder / UNFINISHED_FILENAME
        progress_path = self.scratch_folder / PROGRESS_FILENAME
        if not files.exists(unfinished_path):
            return None
        try:
            tree = json_files.read_checksummed(unfinished_path, META_FORMAT_VERSION)
            if {key: tree[key] for key in self._identity()} != self._identity():
                raise ValueError("the data, a setting or mlxgpt has changed")
            tokenizer = tokenizer_json.load_tokenizer(self.scratch_folder / "tokenizer.json")
            if files.exists(progress_path):
                progress = json_files.read_checksummed(progress_path, META_FORMAT_VERSION)
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
        """Encode the missing chunks and append them to the arrays."""
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
        with files.add_filename_to_errors(path), path.open("ab") as array:  # closing it flushes it
            yield array

    def _save(self, arrays: dict[str, BinaryIO]) -> None:
        for split, array in arrays.items():
            with files.add_filename_to_errors(self.scratch_folder / f"{split}.bin"):
                array.flush()
            files.fsync_path(self.scratch_folder / f"{split}.bin")
        counts = {split: vars(count) for split, count in self.counts.items()}
        tree = {"format": META_FORMAT_VERSION, "chunks": self.chunks, **counts}
        files.write_atomically(
            self.scratch_folder / PROGRESS_FILENAME, json_files.dump_checksummed(tree)
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
        """SHA-256 of an array, which is also stored in the hash cache."""
        stats = self.hash_cache.get_or_compute(
            path.name, [path], lambda: scan_token_file(path, self.dtype)
        )
        return str(stats["sha256"])


def _add_counts(a: SplitMeta, b: SplitMeta) -> SplitMeta:
    return SplitMeta(a.tokens + b.tokens, a.documents + b.documents, a.bytes + b.bytes, "")
