"""Documents -> token arrays, streamed to disk; a data folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from mlxgpt import files
from mlxgpt.config import DataConfig
from mlxgpt.corpus import sources
from mlxgpt.corpus.hub import HUB
from mlxgpt.corpus.sources import Source
from mlxgpt.corpus.tokenizer import CharTokenizer, Tokenizer
from mlxgpt.corpus.tokens import (
    FORMAT,
    SPLITS,
    Dataset,
    Meta,
    SplitMeta,
    dtype_for,
    open_dataset,
    read_meta,
)
from mlxgpt.errors import UserError


def find_or_prepare(
    data: DataConfig,
    data_dir: Path,
    *,
    name: str | None = None,
    megabytes: float | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The prepared data of a config, made now if it isn't there.

    Args:
        data: source, validation source, tokenizer. A source that is a prepared data folder, or
            the name of one in `data_dir`, is opened as it is.
        data_dir: where data folders lie.
        name: the folder's name; default: the corpus, or the first file's stem.
        megabytes: length of the storybook; default: what is there, or a few.
        note: takes a line on what is being done.

    Raises:
        NoConnection: if the text is on the hub, and the hub cannot be reached.
        UserError: if the text cannot be had, or `name` already holds another text.
    """
    sources.check_request(data.source, data.val_source, megabytes)
    known = sources.corpus_name(data.source)
    if len(data.source) == 1 and not data.val_source and not known:
        for folder in (Path(data.source[0]), data_dir / data.source[0]):
            if (folder / "meta.json").is_file():
                return open_dataset(folder)
    folder = data_dir / (name or sources.source_name(data.source))
    there = (folder / "meta.json").exists()
    if known and there:  # not to ask the hub for it, or to write it anew
        origin = sources.corpus_origin(known, megabytes)
    else:
        if known in HUB:
            note(f"getting {HUB[known].path} from the Hugging Face hub")
        source = sources.open_source(data.source, data.val_source, megabytes)
        origin = source.origin
    if there:
        theirs = read_meta(folder).origin
        if origin != ({key: theirs.get(key) for key in origin} if known else theirs):
            raise UserError(
                f"{folder} was prepared from another text",
                f"delete it, or choose another name: mlxgpt prepare {' '.join(data.source)} "
                f"--name NAME, then --source {data_dir}/NAME",
            )
        return open_dataset(folder)
    note(f"preparing {', '.join(data.source)} in {folder}")
    with files.only_one(folder, "preparing"):
        if (folder / "meta.json").exists():  # another process was quicker
            return find_or_prepare(data, data_dir, name=name, megabytes=megabytes)
        return write_dataset(source, folder)


def write_dataset(source: Source, folder: Path) -> Dataset:
    """Tokenize a source into a new data folder, written beside its name and then renamed.
    Only one process at a time may do so.
    """
    if folder.exists():
        raise UserError(f"{folder} exists and holds no prepared data", "choose another --name.")
    # The vocabulary comes from both sides: a character that only the validation text has would
    # otherwise have no id.
    characters: set[str] = set()
    for document in (*source.train, *source.val):
        characters.update(document)
    tokenizer = CharTokenizer(characters, end_of_text=not source.single)
    if len(characters) < 2:
        raise UserError(
            f"the text is nothing but {next(iter(characters), '')!r}: there is nothing to learn",
            "give a text of at least two different characters.",
        )
    dtype = dtype_for(tokenizer.vocab_size)
    scratch = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir(parents=True)
        (scratch / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        sides = {
            split: _write_array(getattr(source, split), tokenizer, dtype, scratch / f"{split}.bin")
            for split in SPLITS
        }
        meta = Meta(
            FORMAT, dtype, tokenizer.vocab_size, tokenizer.fingerprint, source.origin, **sides
        )
        (scratch / "meta.json").write_text(meta.to_json(), encoding="utf-8")
        for path in scratch.iterdir():
            files.sync(path)
        scratch.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}", "free some space, or check permissions."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_dataset(folder)


def _write_array(
    documents: Iterable[str], tokenizer: Tokenizer, dtype: str, path: Path
) -> SplitMeta:
    """Write one array, end-of-text after every document where the tokenizer has one."""
    tokens = count = size = 0
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for document in documents:
            ids = tokenizer.encode(document)
            if tokenizer.end_of_text is not None:
                ids = np.append(ids, tokenizer.end_of_text)
            block = ids.astype(dtype).tobytes()
            file.write(block)
            digest.update(block)
            tokens, count = tokens + len(ids), count + 1
            size += len(document.encode("utf-8"))
    if not tokens:
        raise UserError(f"the {path.stem} text is empty", "give a longer text.")
    return SplitMeta(tokens, count, size, digest.hexdigest())
