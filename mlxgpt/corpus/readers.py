"""Files -> documents, streamed in pieces of bounded size: text, JSON lines, Parquet, Arrow.

A text file is one document, or several with `<|endoftext|>` between them; of the others, each row's
`text` is one. A line ends with a newline alone, also where the file has Windows' or an old Mac's
line ends, and a byte-order mark is no text: neither is worth a place in a vocabulary.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlxgpt.corpus.tokenizer import END_OF_TEXT, NUL
from mlxgpt.errors import UserError

COLUMN = "text"
PIECE = 1 << 20  # characters; a longer document comes in several pieces
LONGEST_WORD = 4 * PIECE  # a run without white space that is longer is cut anyhow
LONGEST_LINE = 1 << 28  # bytes of one JSON object
ROWS = 1000  # of a table, at a time
BOM = codecs.BOM_UTF8
BOUNDARY = re.compile(r"(?<=\S)[ \t\r\n]")


class Piece(NamedTuple):
    """A document, or a piece of a long one; `last` where the document ends with it.

    Documents are cut before white space that follows something else: there GPT-2's pattern cuts
    them too, so that the pieces' tokens are the document's.
    """

    text: str
    last: bool = True


def read(path: Path, column: str = COLUMN) -> Iterator[Piece]:
    """The documents of a file, by its suffix; text where that is none we know.

    Args:
        column: of a table, the one that holds them.

    Raises:
        UserError: if it cannot be read, or is not what its suffix says.
    """
    table = TABLES.get(path.suffix.lower())
    try:
        yield from table(path, column) if table else _text(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}", "check the file and its permissions."
        ) from error


def text_size(path: Path) -> int:
    """About how many bytes of text a file holds, without reading it."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (OSError, pyarrow.ArrowException):
            return 0  # reading it will tell what is wrong
        groups = range(metadata.num_row_groups)
        return sum(metadata.row_group(n).total_byte_size for n in groups)
    return path.stat().st_size


def _text(path: Path) -> Iterator[Piece]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    rest = ""
    with path.open("rb") as file:
        offset = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(offset)
        while block := file.read(PIECE):
            if (nul := block.find(b"\0")) >= 0:
                raise UserError(
                    f"{path} is no text: byte {offset + nul:,} is NUL",
                    "give a text file; UTF-16 is converted by: iconv -f utf-16 -t utf-8 FILE > NEW",
                )
            rest += _decoded(decoder, block, path, offset)
            offset += len(block)
            *whole, rest = rest.split(END_OF_TEXT)
            for document in whole:
                yield from cut(document)
            *begun, rest = _cut(rest)
            yield from (Piece(text, last=False) for text in begun)
        rest += _decoded(decoder, b"", path, offset)
    yield Piece(rest)


def _decoded(decoder: io.IncrementalNewlineDecoder, block: bytes, path: Path, offset: int) -> str:
    kept = len(decoder.getstate()[0])  # the beginning of a character, from the block before
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {offset - kept + error.start:,})",
            "convert it, for instance: iconv -f latin1 -t utf-8 FILE > NEW",
        ) from error


def _json_lines(path: Path, column: str) -> Iterator[Piece]:
    number = 0

    def where() -> str:
        return f"{path}, line {number:,}"

    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where()} is no JSON object", "mend or leave out that line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{where()} is no JSON object", f'write {{"{column}": "…"}}.')
            if column not in row:
                raise _no_column(where(), column, row)
            yield from _row(row[column], column, where)


def _parquet(path: Path, column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    number = 0

    def where() -> str:
        return f"{path}, row {number:,}"

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from _row(value, column, where)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} is no whole Parquet file: {reason}", "copy or download it again."
        ) from error


def _arrow(path: Path, column: str) -> Iterator[Piece]:
    import pyarrow

    try:
        # Not memory-mapped, so that what was read does not stay in this process's memory.
        with pyarrow.OSFile(str(path)) as file:
            for batch in pyarrow.ipc.open_stream(file):
                for value in batch.column(column).to_pylist():
                    yield from _row(value, column, lambda: str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is no whole Arrow file",
            f"delete the folder {path.parent}, and fetch it again.",
        ) from error


TABLES: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")  # what is taken from a folder


def _row(value: Any, column: str, where: Callable[[], str]) -> Iterator[Piece]:
    if value is None:  # a row all the same: rows are counted
        value = ""
    if not isinstance(value, str):
        raise UserError(
            f"{where()}: {column} is {type(value).__name__}, not text", "give a column of texts."
        )
    if NUL in value:
        raise UserError(f"{where()} holds a NUL character", "leave it out; text has none.")
    try:
        value.isascii() or value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where()} is no valid Unicode", "mend or leave out that one.") from error
    value = value.removeprefix(BOM.decode())
    if "\r" in value:
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    yield from cut(value)


def _no_column(where: str, column: str, columns: Iterable[str]) -> UserError:
    there = ", ".join(map(str, columns)) or "none"
    return UserError(
        f"{where} has no column {column!r}; there is: {there}",
        f"rename the column that holds the documents to {column!r}.",
    )


def cut(document: str) -> Iterator[Piece]:
    """A whole document's pieces."""
    if len(document) > PIECE:
        *begun, document = _cut(document)
        yield from (Piece(text, last=False) for text in begun)
    yield Piece(document)


def _cut(text: str) -> Iterator[str]:
    """Pieces of a text, the last one no longer than it has to be; together they are the text."""
    start = 0
    while len(text) - start > PIECE:
        end = _boundary(text, start, start + PIECE)
        if not end:
            if len(text) - start <= LONGEST_WORD:
                break
            end = _boundary(text, start, start + LONGEST_WORD) or start + LONGEST_WORD - PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _boundary(text: str, start: int, end: int) -> int:
    """The last place in text[start:end] where white space follows something else; 0 for none."""
    width = 1 << 8  # looked at from the end, more and more
    while True:
        begin = max(start + 1, end - width)
        if places := [match.start() for match in BOUNDARY.finditer(text, begin, end)]:
            return places[-1]
        if begin == start + 1:
            return 0
        width *= 8
