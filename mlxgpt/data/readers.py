"""Read documents from text, JSON, Parquet and Arrow files, streamed in pieces of bounded size.

A text file is one document, or several separated by `<|endoftext|>`; in the other formats, each
row's `text` is a document. All are normalized (normalize.py), so that carriage returns and
byte-order marks do not become tokens.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlxgpt.data import formats
from mlxgpt.data.normalize import normalize_text
from mlxgpt.data.tokenizers.base import END_OF_TEXT, NUL
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

DEFAULT_COLUMN = "text"
MAX_PIECE_CHARS = 1 << 20  # longer documents are split into several pieces
UTF8_BOM = codecs.BOM_UTF8


class DocumentPiece(NamedTuple):
    """A document, or a piece of a long one; `last` marks the last piece of a document.

    Documents are split before whitespace that follows a non-space character. GPT-2's pattern
    splits there too, so that the pieces have the same tokens as the whole document.
    """

    text: str
    last: bool = True


def read_documents(path: Path, column: str = DEFAULT_COLUMN) -> Iterator[DocumentPiece]:
    """Read the documents of a file: a table, detected by its first bytes or its suffix, or text.

    Args:
        column: the column of a table that holds the documents.

    Raises:
        UserError: if its content does not match its suffix.
        OSError: if it cannot be read.
    """
    with files.add_filename_to_errors(path):
        head = formats.read_head(path)
        matches = (reader for magic, reader in MAGIC_READERS.items() if head.startswith(magic))
        table_reader = next(matches, TABLE_READERS.get(path.suffix.lower()))
        is_binary_table = table_reader in (_read_parquet, _read_arrow)
        formats.reject_unsupported_format(path, head, is_table=is_binary_table)
        yield from table_reader(path, column) if table_reader else _read_text(path)


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Read the rows of a JSON or Parquet file: the location, such as "FILE, line 3", and the value
    of each; nothing from a file with another suffix.

    Raises:
        UserError: if its content does not match its suffix.
        OSError: if it cannot be read.
    """
    if reader := ROW_READERS.get(path.suffix.lower()):
        with files.add_filename_to_errors(path):
            yield from reader(path)


def read_small_text(path: Path) -> str:
    """Read a small text file, such as a file of prompts.

    Raises:
        UserError: if it is not UTF-8 text.
        OSError: if it cannot be read.
        ValueError: if it is too large.
    """
    formats.reject_unsupported_format(path, formats.read_head(path))
    content = files.read_small_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        raise formats.not_utf8_error(path, error.start, content[line_start:]) from error


def estimate_text_bytes(path: Path) -> int:
    """Estimate the bytes of text in a file without reading it."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        try:
            # pyarrow does not accept file names that are not UTF-8.
            with files.add_filename_to_errors(path), path.open("rb") as file:
                metadata = pyarrow.parquet.read_metadata(file)
        except (OSError, pyarrow.ArrowException) as error:
            if getattr(error, "errno", None):  # the split depends on the size
                raise
            return 0  # damaged: reported when it is read
        groups = range(metadata.num_row_groups)
        return sum(metadata.row_group(n).total_byte_size for n in groups)
    return path.stat().st_size


def _read_text(path: Path) -> Iterator[DocumentPiece]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    rest = ""
    with path.open("rb") as file:
        offset = len(UTF8_BOM) if file.read(len(UTF8_BOM)) == UTF8_BOM else 0
        file.seek(offset)
        while block := file.read(MAX_PIECE_CHARS):
            if (nul := block.find(b"\0")) >= 0:
                raise UserError(
                    f"{path} is not text: byte {offset + nul:,} is NUL",
                    "use a text file; to strip NUL bytes: tr -d '\\000' < FILE > NEW",
                )
            rest += _decode_block(decoder, block, path, offset)
            offset += len(block)
            *documents, rest = rest.split(END_OF_TEXT)
            for document in documents:
                yield from split_into_pieces(document)
            *pieces, rest = _split_text(rest)
            yield from (DocumentPiece(text, last=False) for text in pieces)
        rest += _decode_block(decoder, b"", path, offset)
    yield DocumentPiece(rest)


def _decode_block(
    decoder: io.IncrementalNewlineDecoder, block: bytes, path: Path, offset: int
) -> str:
    n_pending = len(decoder.getstate()[0])  # bytes of a character cut off by the last block
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        line_start = block.rfind(b"\n", 0, max(0, error.start - n_pending)) + 1
        start = offset - n_pending + error.start
        raise formats.not_utf8_error(path, start, block[line_start:]) from error


MAX_JSON_BYTES = 1 << 28  # 256 MiB, for one JSON value


def _read_json_lines(path: Path, column: str) -> Iterator[DocumentPiece]:
    for location, row in _iter_json_lines(path):
        yield from _read_json_row(row, path, column, location)


def _iter_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each line."""
    with path.open("rb") as file:
        lines = iter(functools.partial(file.readline, MAX_JSON_BYTES), b"")
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(UTF8_BOM)
            if not line.strip():
                continue
            location = f"{path}, line {number:,}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                start = file.tell() - len(line) + error.start
                raise formats.not_utf8_error(path, start, line) from error
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{location} is not a JSON object", "fix or omit that line."
                ) from error
            yield location, row


def _read_json(path: Path, column: str) -> Iterator[DocumentPiece]:
    for location, row in _iter_json(path):
        yield from _read_json_row(row, path, column, location)


def _iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each row of a JSON array, a single row, or JSON Lines."""
    if path.stat().st_size > MAX_JSON_BYTES:
        yield from _iter_json_lines(path)
        return
    try:
        tree = json_files.parse_json(path.read_bytes().removeprefix(UTF8_BOM).decode())
    except ValueError:
        yield from _iter_json_lines(path)
        return
    for number, row in enumerate(tree if isinstance(tree, list) else [tree], 1):
        yield f"{path}, entry {number:,}", row


def _read_json_row(row: Any, path: Path, column: str, location: str) -> Iterator[DocumentPiece]:
    """Read the document of a JSON row: a string, or an object with a string in `column`."""
    if isinstance(row, dict):
        if column not in row:
            raise _missing_column_error(location, path, column, row)
        row = row[column]
    elif not isinstance(row, str):
        raise UserError(f"{location} is not a JSON object", f'use the form {{"{column}": "…"}}')
    yield from _read_value(row, column, location)


ROWS_PER_BATCH = 1000


def _read_parquet(path: Path, column: str) -> Iterator[DocumentPiece]:
    with _open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise _missing_column_error(str(path), path, column, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=ROWS_PER_BATCH, columns=[column])
        yield from _read_arrays((batch.column(0) for batch in batches), path, column)


def _iter_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each row."""
    with _open_parquet(path) as file:
        batches = file.iter_batches(batch_size=ROWS_PER_BATCH)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number:,}", row


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as raw_file, pyarrow.parquet.ParquetFile(raw_file) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):  # from the system: pyarrow's own errors have no errno
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} is not a complete Parquet file: {reason}", "copy or download it again."
        ) from error


ARROW_MAGIC = b"ARROW1\0\0"  # Arrow files; Arrow streams have no magic bytes


def _read_arrow(path: Path, column: str) -> Iterator[DocumentPiece]:
    """Read the documents of an Arrow stream (as `datasets` writes), or an Arrow or Feather file."""
    import pyarrow

    try:
        # Not memory-mapped: mapped pages would count toward this process's memory.
        with path.open("rb") as file:
            is_file = file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            if column not in reader.schema.names:
                raise _missing_column_error(str(path), path, column, reader.schema.names)
            if is_file:
                reader = map(reader.get_batch, range(reader.num_record_batches))
            yield from _read_arrays((batch.column(column) for batch in reader), path, column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(
            f"{path} is not a complete Arrow file",
            "copy or download it again; a Hub dataset is downloaded again once its folder, "
            f"{path.parent}, is moved away.",
        ) from error


def _read_arrays(arrays: Iterable[Any], path: Path, column: str) -> Iterator[DocumentPiece]:
    """Read the documents in a table column, given as pyarrow arrays."""
    values = (value for array in arrays for value in array.to_pylist())
    for number, value in enumerate(values, 1):
        yield from _read_value(value, column, f"{path}, row {number:,}")


TableReader = Callable[[Path, str], Iterator[DocumentPiece]]
TABLE_READERS: dict[str, TableReader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
MAGIC_READERS: dict[bytes, TableReader] = {b"PAR1": _read_parquet, ARROW_MAGIC: _read_arrow}
RowReader = Callable[[Path], Iterator[tuple[str, Any]]]
ROW_READERS: dict[str, RowReader] = {
    ".jsonl": _iter_json_lines,
    ".ndjson": _iter_json_lines,
    ".json": _iter_json,
    ".parquet": _iter_parquet,
}
FOLDER_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")  # files that are read from folders


def _read_value(value: Any, column: str, location: str) -> Iterator[DocumentPiece]:
    if value is None:  # kept as an empty document, so that row ranges count it
        value = ""
    if not isinstance(value, str):
        raise UserError(
            f"{location}: {column} is {type(value).__name__}, not text",
            "choose a column of strings.",
        )
    if NUL in value:
        raise UserError(f"{location} contains a NUL character", "strip it from the text.")
    try:
        value.isascii() or value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location} is not valid Unicode", "fix or omit that document.") from error
    yield from split_into_pieces(normalize_text(value))


def _missing_column_error(
    location: str, path: Path, column: str, columns: Iterable[str]
) -> UserError:
    available = ", ".join(map(str, columns)) or "none"
    return UserError(
        f"{location} has no column {column!r}; available: {available}",
        f"specify the text column after the file name: {path}:COLUMN",
    )


def split_into_pieces(document: str) -> Iterator[DocumentPiece]:
    """Split a complete document into pieces."""
    if len(document) > MAX_PIECE_CHARS:
        *pieces, document = _split_text(document)
        yield from (DocumentPiece(text, last=False) for text in pieces)
    yield DocumentPiece(document)


MAX_WORD_CHARS = 4 * MAX_PIECE_CHARS  # a longer run without whitespace is cut anywhere


def _split_text(text: str) -> Iterator[str]:
    """Split text into pieces, with the last one as short as possible."""
    start = 0
    while len(text) - start > MAX_PIECE_CHARS:
        end = _find_boundary(text, start, start + MAX_PIECE_CHARS)
        if not end:
            if len(text) - start <= MAX_WORD_CHARS:
                break
            end = _find_boundary(text, start, start + MAX_WORD_CHARS)
            end = end or start + MAX_WORD_CHARS - MAX_PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


BOUNDARY_PATTERN = re.compile(r"(?<=\S)[ \t\r\n]")


def _find_boundary(text: str, start: int, end: int) -> int:
    """Last index in text[start:end] of whitespace after a non-space character; 0 if none."""
    width = 1 << 8  # characters to search from the end
    while True:
        begin = max(start + 1, end - width)
        if positions := [match.start() for match in BOUNDARY_PATTERN.finditer(text, begin, end)]:
            return positions[-1]
        if begin == start + 1:
            return 0
        width *= 8
