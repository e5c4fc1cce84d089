"""Detect a file's format from its first bytes: text, a table, or one that must be converted.

The suffix is not enough: compressed downloads have arbitrary names, and text files any encoding.
"""

from __future__ import annotations

import codecs
import contextlib
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

HEAD_BYTES = 4096


def read_head(path: Path) -> bytes:
    """Read the first bytes of a file.

    Raises:
        OSError: if it cannot be read.
    """
    with files.add_filename_to_errors(path), path.open("rb") as file:
        return file.read(HEAD_BYTES)


class FileFormat(NamedTuple):
    """A file format that is not supported.

    Attributes:
        name: name with an article, as in "it is a PDF document".
        remedy: how to convert it to text; {file} and {stem} are replaced.
    """

    name: str
    remedy: str


TEXT_REMEDY = "use a text file instead."
MODEL_REMEDY = "use a text file instead; to import a model, use: mlxgpt import"
PANDOC_REMEDY = "convert it: pandoc -t plain {file} -o {stem}.txt"
OFFICE_REMEDY = "open it in an office program and save it as plain text (UTF-8)."

# (offset, magic bytes, format); the first match wins.
MAGIC_FORMATS = (
    (0, b"\x1f\x8b", FileFormat("compressed with gzip", "decompress it: gunzip -k {file}")),
    (0, b"BZh", FileFormat("compressed with bzip2", "decompress it: bunzip2 -k {file}")),
    (0, b"\xfd7zXZ\0", FileFormat("compressed with xz", "decompress it: xz -dk {file}")),
    (
        0,
        b"\x28\xb5\x2f\xfd",
        FileFormat("compressed with Zstandard", "decompress it: zstd -d {file}"),
    ),
    (0, b"\x04\x22\x4d\x18", FileFormat("compressed with LZ4", "decompress it: lz4 -dk {file}")),
    (0, b"\x1f\x9d", FileFormat("compressed with compress", "decompress it: uncompress -k {file}")),
    (0, b"7z\xbc\xaf\x27\x1c", FileFormat("a 7z archive", "unpack it: 7z x {file}")),
    (0, b"Rar!\x1a\x07", FileFormat("a RAR archive", "unpack it: unrar x {file}")),
    (257, b"ustar", FileFormat("a tar archive", "unpack it: tar -xf {file}")),
    (0, b"%PDF-", FileFormat("a PDF document", "convert it: pdftotext {file} {stem}.txt")),
    (0, b"{\\rtf", FileFormat("an RTF document", PANDOC_REMEDY)),
    (
        0,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        FileFormat("an older Microsoft Office file", OFFICE_REMEDY),
    ),
    (
        0,
        b"SQLite format 3\0",
        FileFormat(
            "an SQLite database",
            "export a column to a file: sqlite3 {file} 'SELECT text FROM documents' > {stem}.txt",
        ),
    ),
    (
        0,
        b"FEA1",
        FileFormat("a Feather version 1 file", "save it as Parquet or Feather version 2."),
    ),
    (0, b"ORC", FileFormat("an ORC table", "convert it to Parquet, for example with pyarrow.")),
    (0, b"Obj\x01", FileFormat("an Avro table", "convert it to Parquet or JSON Lines.")),
    (0, b"\x93NUMPY", FileFormat("a NumPy array, not text", TEXT_REMEDY)),
    (0, b"\x89HDF\r\n\x1a\n", FileFormat("an HDF5 file, not text", TEXT_REMEDY)),
    (0, b"GGUF", FileFormat("a GGUF model, not text", MODEL_REMEDY)),
    (8, b'{"', FileFormat("a safetensors file, not text", MODEL_REMEDY)),
    *(
        (0, bytes([0x80, n]), FileFormat("a Python pickle, not text", MODEL_REMEDY))
        for n in range(1, 6)
    ),
    (0, b"\x89PNG\r\n\x1a\n", FileFormat("an image (PNG), not text", TEXT_REMEDY)),
    (0, b"\xff\xd8\xff", FileFormat("an image (JPEG), not text", TEXT_REMEDY)),
    (0, b"GIF8", FileFormat("an image (GIF), not text", TEXT_REMEDY)),
    (0, b"II*\0", FileFormat("an image (TIFF), not text", TEXT_REMEDY)),
    (8, b"WEBP", FileFormat("an image (WebP), not text", TEXT_REMEDY)),
    (8, b"WAVE", FileFormat("an audio file (WAV), not text", TEXT_REMEDY)),
    (0, b"fLaC", FileFormat("an audio file (FLAC), not text", TEXT_REMEDY)),
    (0, b"OggS", FileFormat("an audio file (Ogg), not text", TEXT_REMEDY)),
    (0, b"ID3", FileFormat("an audio file (MP3), not text", TEXT_REMEDY)),
    (4, b"ftyp", FileFormat("a video or audio file (MP4), not text", TEXT_REMEDY)),
    (0, b"\x7fELF", FileFormat("an executable, not text", TEXT_REMEDY)),
    (0, b"\xcf\xfa\xed\xfe", FileFormat("an executable, not text", TEXT_REMEDY)),
)

# Byte-order marks, longest first.
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
CSV_SUFFIXES = (".csv", ".tsv")
CSV_TO_JSONL_COMMAND = (
    "python3 -c 'import csv, json, sys; [print(json.dumps(r)) for r in csv.DictReader(sys.stdin"
    "{tabs})]' < {file} > {stem}.jsonl"
)


def reject_unsupported_format(path: Path, head: bytes, *, is_table: bool = False) -> None:
    """Reject a file that is neither text nor a supported table.

    Args:
        is_table: whether the file is read as a binary table.

    Raises:
        UserError: with its format, and the command that converts it to text.
    """
    for offset, magic, file_format in MAGIC_FORMATS:
        if head.startswith(magic, offset) and _is_binary(head, magic):
            raise _unsupported_format_error(path, file_format)
    if head.startswith(b"PK\x03\x04"):
        raise _unsupported_format_error(path, _identify_zip(path))
    if is_table:
        return
    for bom, name in BYTE_ORDER_MARKS:
        if head.startswith(bom):
            raise _encoding_error(path, f"{path} is {name} text", name)
    if b"\0" in head and (encoding := _guess_wide_encoding(head)):
        raise _encoding_error(path, f"{path} is {encoding} text", encoding)
    if path.suffix.lower() in CSV_SUFFIXES:
        delimiter_arg = ', delimiter="\\t"' if path.suffix.lower() == ".tsv" else ""
        command = CSV_TO_JSONL_COMMAND.replace("{tabs}", delimiter_arg)
        remedy = f"convert it: {command}; or rename it to .txt to train on it as is."
        raise _unsupported_format_error(path, FileFormat("a table, not text", remedy))


def markup_notice(path: Path) -> str | None:
    """Notice that an HTML or XML file is read as plain text; None for other files."""
    try:
        head = read_head(path).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    except OSError:  # raised again when it is read
        return None
    is_markup = path.suffix.lower() in (".html", ".htm", ".xhtml", ".xml")
    if is_markup or head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        command = _fill_command("pandoc -t plain {file} -o {stem}.txt", path)
        return f"{path} is read as plain text, including its markup; to strip it: {command}"
    return None


def not_utf8_error(path: Path, offset: int, sample: bytes) -> UserError:
    """Error for a file that is not UTF-8, with its likely encoding.

    Args:
        offset: position of the first byte that is not UTF-8.
        sample: bytes from the start of that line, to guess the encoding from.
    """
    problem = f"{path} is not UTF-8 text (byte {offset:,})"
    encoding = guess_encoding(sample)
    if encoding:
        return _encoding_error(path, f"{problem}; it looks like {encoding}", encoding)
    return _encoding_error(path, problem, "WINDOWS-1252", "convert it, for example")


ENCODING_SAMPLE_BYTES = 50_000
# Python's encoding names -> iconv's.
ICONV_NAMES = {
    "cp1252": "WINDOWS-1252",
    "cp932": "SHIFT_JIS",
    "euc_jp": "EUC-JP",
    "gb18030": "GB18030",
    "big5": "BIG5",
    "cp949": "CP949",
    "cp1251": "WINDOWS-1251",
    "koi8_r": "KOI8-R",
}


def guess_encoding(sample: bytes) -> str | None:
    """Guess the encoding of text, by its name in iconv; None if none fits."""
    return _detect_encoding(sample[:ENCODING_SAMPLE_BYTES], ICONV_NAMES)


NON_TEXT_BYTES = bytes([*range(9), *range(14, 27), 127])  # control characters, not in text


def _is_binary(head: bytes, magic: bytes) -> bool:
    """Whether a file with these magic bytes is binary; text could start with some of them."""
    if magic == b'{"':  # safetensors: preceded by the length of the JSON header in eight bytes
        return head[5:8] == bytes(3)
    if not magic.isalnum():
        return True
    return any(byte in NON_TEXT_BYTES or byte > 127 for byte in head)


def _identify_zip(path: Path) -> FileFormat:
    """Identify the format of a ZIP archive, such as a Word document."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            mimetype = archive.open("mimetype").read(100) if "mimetype" in names else b""
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError):
        names, mimetype = [], b""
    if b"epub" in mimetype:
        return FileFormat("an EPUB book", PANDOC_REMEDY)
    if b"opendocument" in mimetype:
        return FileFormat("an OpenDocument file", PANDOC_REMEDY)
    if "word/document.xml" in names:
        return FileFormat("a Word document", PANDOC_REMEDY)
    if any(name.startswith(("xl/", "ppt/")) for name in names):
        return FileFormat("a Microsoft Office file", OFFICE_REMEDY)
    if any(name.endswith("data.pkl") for name in names):
        return FileFormat("a PyTorch file, not text", MODEL_REMEDY)
    if names and all(name.endswith(".npy") for name in names):
        return FileFormat("NumPy arrays, not text", TEXT_REMEDY)
    return FileFormat("a ZIP archive", "unpack it and use the folder: unzip {file} -d {stem}")


WIDE_ICONV_NAMES = {
    "utf_16_le": "UTF-16LE",
    "utf_16_be": "UTF-16BE",
    "utf_32_le": "UTF-32LE",
    "utf_32_be": "UTF-32BE",
}


def _guess_wide_encoding(head: bytes) -> str | None:
    """Guess whether a file is UTF-16 or UTF-32 text without a byte-order mark: iconv's name."""
    if head.count(b"\0") <= len(head) // 8:
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
            return None  # UTF-8 text with some NULs
    encoding = _detect_encoding(head, WIDE_ICONV_NAMES)
    text = codecs.getincrementaldecoder(encoding)().decode(head) if encoding else ""
    return None if any(ord(c) < 128 and ord(c) in NON_TEXT_BYTES for c in text) else encoding


CYRILLIC_ENCODINGS = ("cp1251", "koi8_r")


def _detect_encoding(sample: bytes, encodings: Mapping[str, str]) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=list(encodings)).best()
    name = best.encoding if best else ""
    if name in CYRILLIC_ENCODINGS and sum(byte > 127 for byte in sample) < len(sample) // 3:
        name = "cp1252"  # mostly Latin letters
    elif name in CYRILLIC_ENCODINGS:  # the wrong one swaps upper and lower case
        name = max(
            CYRILLIC_ENCODINGS, key=lambda n: sum(map(str.islower, sample.decode(n, "replace")))
        )
    return encodings.get(name)


def _encoding_error(
    path: Path, problem: str, encoding: str, advice: str = "convert it"
) -> UserError:
    command = _fill_command(
        f"iconv -f {encoding} -t UTF-8 {{file}} > {{stem}}-utf8{path.suffix}", path
    )
    return UserError(problem, f"{advice}: {command}")


def _unsupported_format_error(path: Path, file_format: FileFormat) -> UserError:
    return UserError(f"{path} is {file_format.name}", _fill_command(file_format.remedy, path))


def _fill_command(command: str, path: Path) -> str:
    file, stem = shlex.quote(str(path)), shlex.quote(str(path.with_suffix("")))
    return command.replace("{file}", file).replace("{stem}", stem)
