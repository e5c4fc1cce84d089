"""Documents -> token arrays: streamed, on all cores, in bounded memory.

A data folder appears whole or not at all. An interrupted preparation continues where it was, and
ends with the same bytes.
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
from mlxgpt.config import DataConfig
from mlxgpt.data import sources
from mlxgpt.data.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.data.hash_cache import Verified
from mlxgpt.data.meta import FORMAT, SPLITS, Meta, SplitMeta, read_meta
from mlxgpt.data.normalize import known_form
from mlxgpt.data.sources import Source
from mlxgpt.data.splits import LARGEST_VAL_SHARE, SplitRule, documents, parts, survey
from mlxgpt.data.token_array import dtype_for, read_whole
from mlxgpt.data.tokenize import encode
from mlxgpt.data.tokenizers import bpe, tokenizer_json
from mlxgpt.data.tokenizers.char import NUL, Tokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

SAVE_EVERY = 32  # chunks
UNFINISHED, PROGRESS, META = "unfinished.json", "progress.json", "meta.json"


# So many of about so many bytes of text are done: (doing, done, total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare, and how.

    Attributes:
        data: source, validation source, tokenizer. A source that is a prepared data folder, or
            the name of one in the folder for data, is opened as it is.
        vocab_size: of a BPE that is trained for it; 0: bpe.DEFAULT_VOCAB_SIZE.
        strict: refuse a text that gives a smaller vocabulary.
        name: the folder's name; default: the corpus or the first file's stem, and the tokenizer.
        megabytes: length of the storybook; default: what is there, or a few.
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
    def kind(self) -> str:
        """The tokenizer, as the data folder's name and origin have it: `char`, `gpt2`, `bpe4096`,
        `as-FINGERPRINT`.
        """
        if self.tokenizer and self.data.tokenizer != "gpt2":
            return f"as-{self.tokenizer.fingerprint[:8]}"
        if self.data.tokenizer == "bpe":
            return f"bpe{self.vocab_size or bpe.DEFAULT_VOCAB_SIZE}"
        return self.data.tokenizer

    def with_kind(self, origin: dict[str, Any]) -> dict[str, Any]:
        """A source's origin, with the tokenizer unless that is of characters."""
        return origin if self.kind == "char" else {**origin, "tokenizer": self.kind}


def find_or_prepare(
    request: PrepareRequest,
    data_dir: Path,
    progress: Progress = lambda doing, done, total: None,
) -> Dataset:
    """The prepared data of a request, made now if it isn't there.

    Args:
        data_dir: the folder of data folders.
        progress: receives how many of about how many bytes of text are read, or encoded.

    Raises:
        Unavailable: if the text is the hub's, and could not be downloaded.
        UserError: if the text is missing, or `name` already holds another one.
    """
    data = request.data
    sources.check_request(data.source, data.val_source, request.megabytes)
    if len(data.source) == 1 and not data.val_source and not sources.corpus_name(data.source):
        for folder in (Path(data.source[0]), data_dir / data.source[0]):
            if is_prepared(folder):
                return open_dataset(folder, verify=request.verify)
    if request.kind.startswith("bpe"):
        bpe.check_vocab_size(request.vocab_size or bpe.DEFAULT_VOCAB_SIZE)
    suffix = "" if request.kind == "char" else f"-{request.kind}"
    folder = data_dir / request.name if request.name else _folder(data_dir, data.source, suffix)
    verified = Verified(folder, reread=request.verify)
    if files.exists(folder / META):
        if not _is_of_request(folder, request, verified):
            again = shlex.join(["mlxgpt", "prepare", *data.source, "--name", "NAME"])
            raise UserError(
                f"{folder} was prepared from another text, or with another tokenizer",
                f"choose another name: {again}, then --source {data_dir}/NAME",
            )
        verified.save()
        return open_dataset(folder, verify=request.verify)
    source = sources.open_source(data.source, data.val_source, request.megabytes, verified)
    source = replace(source, origin=request.with_kind(source.origin))
    if files.exists(folder) and not files.exists(folder / META):
        raise UserError(f"{folder} exists and holds no prepared data", "choose another --name.")
    logger.info(f"preparing {', '.join(data.source)} in {folder}")
    with files.only_one(folder, "preparing"):
        if not files.exists(folder / META):  # or another process was quicker
            _Preparation(source, request, folder, verified, progress).run()
    return open_dataset(folder)


def _is_of_request(folder: Path, request: PrepareRequest, verified: Verified) -> bool:
    """Whether a data folder was prepared from the text and with the tokenizer of a request."""
    data, megabytes = request.data, request.megabytes
    is_corpus = sources.corpus_name(data.source) is not None
    if is_corpus:  # known without downloading or writing it
        origin = sources.corpus_origin(data.source, megabytes)
    elif gone := sources.origin_of_gone(data.source, data.val_source, verified):
        logger.info(f"{', '.join(data.source)} is gone; {folder} was prepared from it")
        origin = gone
    else:
        origin = sources.open_source(data.source, data.val_source, megabytes, verified).origin
    origin, prepared = request.with_kind(origin), read_meta(folder).origin
    if is_corpus:  # what is known of it beyond the request does not matter; its tokenizer does
        prepared = {k: value for k, value in prepared.items() if k in (*origin, "tokenizer")}
    return sources.comparable(origin) == sources.comparable(prepared)


def _folder(data_dir: Path, source: Sequence[str], suffix: str) -> Path:
    """The folder for a source's data; its former one, where these files were prepared in it."""
    folder = data_dir / (sources.source_name(source) + suffix)
    former = data_dir / (sources.former_name(source) + suffix)
    if former != folder and not files.exists(folder):
        with contextlib.suppress(UserError):
            if read_meta(former).origin.get("files") == [Path(name).name for name in source]:
                return former
    return folder


def encode_files(paths: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of some files' documents, each with its end. What is left out is logged.

    Raises:
        UserError: if there is no text, or the tokenizer knows single texts and there are several.
    """
    ends = tokenizer.end_of_text is not None
    texts = [""]
    for text, last in documents(sources.open_files(paths)):
        texts[-1] += text
        if last:
            texts.append("")
    texts.pop()
    if not texts:
        raise UserError(f"there is no text in {', '.join(paths)}", "give files that are not empty.")
    texts = [known_form(text, tokenizer) for text in texts]
    if ends:
        texts = [text.strip("\r\n") for text in texts]
    elif len(texts) > 1:
        raise UserError(
            "this run knows single texts, and the source holds several",
            "give one text file without <|endoftext|>.",
        )
    return tokenizer.encode_stream("".join(text + NUL if ends else text for text in texts))


class _Preparation:
    """One data folder in the making, beside its final name until it is whole.

    unfinished.json holds what it will be, and which documents are validation; progress.json how far
    the arrays are. Both are sealed, and written when what they describe is on the disk. Where
    meta.json is there and unfinished.json is not, only the rename is missing.
    """

    def __init__(
        self,
        source: Source,
        request: PrepareRequest,
        folder: Path,
        verified: Verified,
        progress: Progress,
    ) -> None:
        self.source, self.request, self.folder = source, request, folder
        self.verified, self.progress = verified, progress
        self.scratch = folder.with_name(f".{folder.name}.new")
        self.counts = {split: SplitMeta(0, 0, 0, "") for split in SPLITS}
        self.chunks = 0

    def run(self) -> None:
        """Prepare, or continue preparing."""
        try:
            if not self._is_whole():
                rule, tokenizer = self._begun() or self._begin()
                self.dtype = dtype_for(tokenizer.vocab_size)
                self._encode(rule, tokenizer)
                self._finish(tokenizer)
            self._publish()
        except UserError:
            # The text or a setting is wrong: continued, the same command would end here again.
            self._discard()
            raise
        except BaseException:
            # Interrupted, a full or failing disk, an error of ours: as after a kill, all that was
            # saved is kept.
            with contextlib.suppress(OSError):  # of a disk that does not even answer that
                kept = any(files.exists(self.scratch / name) for name in (UNFINISHED, META))
                logger.info(
                    "the same command continues from here"
                    if kept
                    else "the same command begins again: there was nothing to keep yet"
                )
                if not kept:
                    self._discard()
            raise
        files.sync(self.folder.parent)

    def _discard(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _identity(self) -> dict[str, Any]:
        # The version, since another one may cut documents into other pieces.
        return {"format": FORMAT, "version": __version__, "origin": self.source.origin}

    def _begin(self) -> tuple[SplitRule, Tokenizer]:
        if files.exists(self.scratch):
            shutil.rmtree(self.scratch)
        self.counts, self.chunks = {split: SplitMeta(0, 0, 0, "") for split in SPLITS}, 0
        rule, made = survey(self.source, self.request.kind, self._reading)
        if rule.tails:
            logger.info(
                "validation: the last tenth of each document, since whole documents would be more "
                f"than {LARGEST_VAL_SHARE:.0%} of the text"
            )
        tokenizer = self._large_enough(self.request.tokenizer or made or bpe.gpt2())
        if tokenizer.end_of_text is None and not rule.single:
            raise UserError(
                "the tokenizer knows single texts, and the source holds several",
                "give one text file without <|endoftext|>.",
            )
        self.scratch.mkdir(parents=True)
        files.write_atomically(self.scratch / "tokenizer.json", tokenizer.to_json())
        for split in SPLITS:
            with files.naming(path := self.scratch / f"{split}.bin"):
                path.touch()
        tree = {**self._identity(), "sharing": asdict(rule)}
        files.write_atomically(self.scratch / UNFINISHED, files.sealed(tree))
        return rule, tokenizer

    def _large_enough(self, tokenizer: Tokenizer) -> Tokenizer:
        wanted = int(self.request.kind[3:]) if self.request.kind.startswith("bpe") else 0
        if tokenizer.vocab_size < wanted:
            problem = f"the text gives a vocabulary of {tokenizer.vocab_size:,}, not {wanted:,}"
            if self.request.strict:
                raise UserError(
                    problem, f"use --vocab-size {tokenizer.vocab_size}, or a longer text."
                )
            logger.info(problem)
        return tokenizer

    def _is_whole(self) -> bool:
        """Whether an interrupted preparation of the same text had only its rename left."""
        if files.exists(self.scratch / UNFINISHED) or not files.exists(self.scratch / META):
            return False
        with contextlib.suppress(UserError):  # a damaged meta.json
            return read_meta(self.scratch).origin == self.source.origin
        return False

    def _begun(self) -> tuple[SplitRule, Tokenizer] | None:
        """What an interrupted preparation of the same text left; None if nothing can be continued.

        Raises:
            OSError: if that cannot be read. It stays: the next attempt may read it.
        """
        if not files.exists(self.scratch / UNFINISHED):
            return None
        try:
            tree = files.read_sealed(self.scratch / UNFINISHED, FORMAT)
            if {key: tree[key] for key in self._identity()} != self._identity():
                raise ValueError("the text, a setting or mlxgpt has changed since")
            tokenizer = tokenizer_json.load(self.scratch / "tokenizer.json")
            if files.exists(self.scratch / PROGRESS):
                progress = files.read_sealed(self.scratch / PROGRESS, FORMAT)
                self.counts = {split: SplitMeta(**progress[split]) for split in SPLITS}
                self.chunks = progress["chunks"]
            item = int(dtype_for(tokenizer.vocab_size)[-1])
            for split in SPLITS:
                path, size = self.scratch / f"{split}.bin", item * self.counts[split].tokens
                if path.stat().st_size < size:
                    raise ValueError(f"{path.name} is too short")
                os.truncate(path, size)
            rule = SplitRule(**tree["sharing"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, UserError) as error:
            reason = getattr(error, "problem", error)
            logger.info(
                f"what is in {self.scratch} cannot be continued, so it is begun again: {reason}"
            )
            return None
        if self.chunks:
            logger.info(f"continuing after {self._done / 1e6:,.0f} MB")
        return rule, self._large_enough(tokenizer)

    @property
    def _done(self) -> int:
        return sum(count.bytes for count in self.counts.values())

    def _reading(self, done: int) -> None:
        self.progress("reading", done, self.source.size)

    def _encode(self, rule: SplitRule, tokenizer: Tokenizer) -> None:
        """Append the chunks that are still missing."""
        with contextlib.ExitStack() as stack:
            arrays = {split: stack.enter_context(self._appended(split)) for split in SPLITS}
            found = parts(self.source, rule)
            encoded = encode(found, tokenizer, self.dtype, start=self.chunks)
            for chunk in stack.enter_context(contextlib.closing(encoded)):
                for split, (block, count) in chunk.items():
                    with files.naming(self.scratch / f"{split}.bin"):
                        arrays[split].write(block)
                    self.counts[split] = _sum(self.counts[split], count)
                self.chunks += 1
                self.progress("encoding", self._done, self.source.size)
                if self.chunks % SAVE_EVERY == 0:
                    self._save(arrays)

    @contextlib.contextmanager
    def _appended(self, split: str) -> Iterator[BinaryIO]:
        path = self.scratch / f"{split}.bin"
        with files.naming(path), path.open("ab") as array:  # closing it writes, too
            yield array

    def _save(self, arrays: dict[str, BinaryIO]) -> None:
        for split, array in arrays.items():
            with files.naming(self.scratch / f"{split}.bin"):
                array.flush()
            files.sync(self.scratch / f"{split}.bin")
        counts = {split: vars(count) for split, count in self.counts.items()}
        tree = {"format": FORMAT, "chunks": self.chunks, **counts}
        files.write_atomically(self.scratch / PROGRESS, files.sealed(tree))

    def _finish(self, tokenizer: Tokenizer) -> None:
        sides = {}
        for split, count in self.counts.items():
            if not count.tokens:
                raise UserError(f"the {split} text is empty", "give a longer text.")
            sides[split] = replace(count, sha256=self._read(self.scratch / f"{split}.bin"))
        meta = Meta(
            FORMAT,
            self.dtype,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
            self.source.origin,
            **sides,
        )
        self.verified.save(self.scratch)
        files.write_atomically(self.scratch / META, meta.to_json())
        for path in self.scratch.iterdir():
            files.sync(path)

    def _publish(self) -> None:
        for name in (UNFINISHED, PROGRESS):  # in this order, see `_is_whole`
            (self.scratch / name).unlink(missing_ok=True)
        self.scratch.rename(self.folder)

    def _read(self, path: Path) -> str:
        """The sha256 of an array; that it was read is remembered."""
        found = self.verified.once(path.name, [path], lambda: read_whole(path, self.dtype))
        return str(found["sha256"])


def _sum(a: SplitMeta, b: SplitMeta) -> SplitMeta:
    return SplitMeta(a.tokens + b.tokens, a.documents + b.documents, a.bytes + b.bytes, "")
