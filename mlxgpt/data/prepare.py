"""`mlxgpt.prepare`: open a prepared dataset, or prepare it first."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxgpt import config as configs
from mlxgpt.config import DataConfig
from mlxgpt.config.resolve import PathLike, resolve_folder
from mlxgpt.data import sources
from mlxgpt.data.dataset import Dataset, is_prepared, open_dataset
from mlxgpt.data.example_rows import find_first_example
from mlxgpt.data.examples import prepare_examples
from mlxgpt.data.hash_cache import HashCache
from mlxgpt.data.meta import read_meta
from mlxgpt.data.normalize import normalize_unicode
from mlxgpt.data.prepare_job import META_FILENAME, PrepareJob, PrepareRequest, ProgressCallback
from mlxgpt.data.sources import SYNTHETIC, resolve_hub_dataset
from mlxgpt.data.splits import (
    drop_blank_documents,
)
from mlxgpt.data.tokenizers import bpe
from mlxgpt.data.tokenizers.base import NUL, Tokenizer
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


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
    """Tokenize a dataset into DATA_DIR/NAME, or open it if it is already prepared.

    Args:
        source: `shakespeare` (default), `tinystories`, `tinystories-gpt4`, `openwebtext`,
            `synthetic`; a Hub dataset, `hf:owner/name` or `hf:owner/name:column`; or files and
            folders: text, JSON, Parquet, Arrow; `FILE:COLUMN` for another column than `text`.
        val_source: validation text; default: split from the source.
        name: name of the data folder; default: the corpus or the first file's stem, plus the
            tokenizer.
        tokenizer: `char`, `bpe` or `gpt2`; default: `bpe` with `vocab_size`, and for Hub datasets
            except `shakespeare` (`char`) and `openwebtext` (`gpt2`); else `char`.
        vocab_size: vocabulary size of a BPE; default: 4096.
        megabytes: size of the synthetic stories in MB; default: that of prepared ones, or 10.
        verify: check the hashes of prepared files, even if they have not changed since the last
            check.
        progress: called with (stage, done, total), in bytes of text.
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
        data_dir: parent folder of the data folders.
        progress: called with the stage, "reading" or "encoding", bytes done and total bytes.

    Raises:
        DatasetUnavailableError: if a Hub dataset could not be downloaded.
        UserError: if the source is missing, or the data folder contains another dataset.
    """
    data = request.data
    sources.check_source_args(data.source, data.val_source, request.megabytes)
    if request.examples and request.tokenizer:
        return open_dataset(prepare_examples(data, request.examples, request.tokenizer, data_dir))
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
    if find_first_example(data):
        raise UserError(
            f"{', '.join(data.source)} contains prompts and answers, not text",
            "fine-tune a model on it: mlxgpt train --init-from RUN --source FILE.",
        )
    source = sources.open_source(data.source, data.val_source, request.megabytes, hash_cache)
    source = replace(source, origin=request.add_tokenizer_to_origin(source.origin))
    if files.exists(folder) and not files.exists(folder / META_FILENAME):
        raise UserError(f"{folder} exists, but contains no prepared data", "choose another --name.")
    logger.info(f"preparing {', '.join(data.source)} in {folder}")
    with files.file_lock(folder, "preparing"):
        if not files.exists(folder / META_FILENAME):  # prepared by another process meanwhile
            PrepareJob(source, request, folder, hash_cache, progress).run()
    return open_dataset(folder)


def _matches_request(folder: Path, request: PrepareRequest, hash_cache: HashCache) -> bool:
    """Whether a data folder was prepared from the source and with the tokenizer of a request."""
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
    """Data folder for a source, with its legacy name if it was prepared under that name."""
    folder = data_dir / (sources.data_folder_name(source) + suffix)
    legacy_folder = data_dir / (sources.legacy_data_folder_name(source) + suffix)
    if legacy_folder != folder and not files.exists(folder):
        with contextlib.suppress(UserError):
            origin = read_meta(legacy_folder).origin
            if sources.corpus_name(source) == SYNTHETIC:
                is_same = SYNTHETIC in origin
            else:
                is_same = origin.get("files") == [Path(name).name for name in source]
            if is_same:
                return legacy_folder
    return folder


def encode_files(paths: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Encode the documents of some files, each with its end-of-text: ids [n]. Logs skipped files.

    Raises:
        UserError: if there is no text, or several documents and no end-of-text token.
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
