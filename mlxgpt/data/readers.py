"""Files -> documents, streamed in pieces of bounded size: text, JSON, Parquet, Arrow.

A text file is one document, or several with `<|endoftext|>` between them; of the others, each row's
`text` is one. All are normalized: line ends are newlines, and a byte-order mark is dropped, since
neither is worth a place in a vocabulary (normalize.py).
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlxgpt.data import formats
from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.char import END_OF_TEXT, NUL
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

COLUMN = "text"
PIECE = 1 << 20  # characters; a longer document comes in several pieces
LONGEST_WORD = 4 * PIECE  # a run without white space that is longer is cut anyhow
LONGEST_LINE = 1 << 28  # bytes of one JSON value
ROWS = 1000  # of a table, at a time
BOM = codecs.BOM_UTF8
ARROW = b"ARROW1\0\0"  # begins an Arrow file, which an Arrow stream does not
BOUNDARY = re.compile(r"(?<=\S)[ \t\r\n]")


class Piece(NamedTuple):
    """A document, or a piece of a long one; `last` where the document ends with it.

    Documents are cut before white space that follows something else: there GPT-2's pattern cuts
    them too, so that the pieces' tokens are the document's.
    """

    text: str
    last: bool = True


def read(path: Path, column: str = COLUMN) -> Iterator[Piece]:
    """The documents of a file: a table by its first bytes or its suffix; else plain text.

    Args:
        column: of a table, the one that holds them.

    Raises:
        UserError: if it is not what its suffix says.
        OSError: if it cannot be read.
    """
    with files.naming(path):
        head = formats.read_head(path)
        tables = (table for magic, table in MAGIC.items() if head.startswith(magic))
        table = next(tables, TABLES.get(path.suffix.lower()))
        formats.refuse_other(path, head, is_table=table in (_parquet, _arrow))
        yield from table(path, column) if table else _text(path)


def read_small_text(path: Path) -> str:
    """The content of a small text file, such as one of prompts.

    Raises:
        UserError: if it is not UTF-8 text.
        OSError: if it cannot be read.
        ValueError: if it is too large.
    """
    formats.refuse_other(path, formats.read_head(path))
    content = files.read_small_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.rfind(b"\n", 0, error.start) + 1
        raise formats.not_utf8(path, error.start, content[line:]) from error


def text_size(path: Path) -> int:
    """About how many bytes of text a file holds, without reading it."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        try:
            # pyarrow takes no name with bytes that are not UTF-8.
            with files.naming(path), path.open("rb") as file:
                metadata = pyarrow.parquet.read_metadata(file)
        except (OSError, pyarrow.ArrowException) as error:
            if getattr(error, "errno", None):  # the size decides which documents are validation
                raise
            return 0  # damaged: reading it shows how
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
                    f"{path} is not text: byte {offset + nul:,} is NUL",
                    "give a text file; single NULs are left out by: tr -d '\\000' < FILE > NEW",
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
        line = block.rfind(b"\n", 0, max(0, error.start - kept)) + 1
        raise formats.not_utf8(path, offset - kept + error.start, block[line:]) from error


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
            except UnicodeDecodeError as error:
                start = file.tell() - len(line) + error.start
                raise formats.not_utf8(path, start, line) from error
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where()} is not a JSON object", "correct or leave out that line."
                ) from error
            yield from _json_row(row, path, column, where)


def _json(path: Path, column: str) -> Iterator[Piece]:
    """A JSON array of rows, or one row; where it is neither, JSON lines."""
    if path.stat().st_size > LONGEST_LINE:
        yield from _json_lines(path, column)
        return
    try:
        tree = files.parse_json(path.read_bytes().removeprefix(BOM).decode())
    except ValueError:
        yield from _json_lines(path, column)
        return
    number = 0

    def where() -> str:
        return f"{path}, entry {number:,}"

    for row in tree if isinstance(tree, list) else [tree]:
        number += 1
        yield from _json_row(row, path, column, where)


def _json_row(row: Any, path: Path, column: str, where: Callable[[], str]) -> Iterator[Piece]:
    """A text, or an object that has one."""
    if isinstance(row, dict):
        if column not in row:
            raise _no_column(where(), path, column, row)
        row = row[column]
    elif not isinstance(row, str):
        raise UserError(f"{where()} is not a JSON object", f'write {{"{column}": "…"}}.')
    yield from _row(row, column, where)


def _parquet(path: Path, column: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    number = 0

    def where() -> str:
        return f"{path}, row {number:,}"

    try:
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), path, column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from _row(value, column, where)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):  # the system's: pyarrow's own have no number
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} is not a whole Parquet file: {reason}", "copy or download it again."
        ) from error


def _arrow(path: Path, column: str) -> Iterator[Piece]:
    """An Arrow stream, as `datasets` writes it, or an Arrow file, which is also Feather."""
    import pyarrow

    number = 0

    def where() -> str:
        return f"{path}, row {number:,}"

    try:
        # Not memory-mapped, so that what was read does not stay in this process's memory.
        with path.open("rb") as file:
            is_file = file.read(len(ARROW)) == ARROW
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            if column not in reader.schema.names:
                raise _no_column(str(path), path, column, reader.schema.names)
            if is_file:
                reader = map(reader.get_batch, range(reader.num_record_batches))
            for batch in reader:
                for value in batch.column(column).to_pylist():
                    number += 1
                    yield from _row(value, column, where)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(
            f"{path} is not a whole Arrow file",
            "copy or download it again; a dataset of the hub is fetched again when its folder, "
            f"{path.parent}, is moved away.",
        ) from error


Reader = Callable[[Path, str], Iterator[Piece]]
TABLES: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
MAGIC: dict[bytes, Reader] = {b"PAR1": _parquet, ARROW: _arrow}
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
        raise UserError(
            f"{where()} is not valid Unicode", "correct or leave out that one."
        ) from error
    yield from cut(normalize_text(value))


def _no_column(where: str, path: Path, column: str, columns: Iterable[str]) -> UserError:
    there = ", ".join(map(str, columns)) or "none"
    return UserError(
        f"{where} has no column {column!r}; there is: {there}",
        f"name the column that holds the documents after the file: {path}:COLUMN.",
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
