"""What a file is, by its first bytes: text, a table, or what has to be converted first.

A name's ending is not enough: downloads are compressed under any name, and an editor's "save as"
decides the encoding.
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

HEAD = 4096  # bytes
SAMPLE = 50_000  # bytes by which an encoding is guessed
CSV = (".csv", ".tsv")
CSV_TO_JSON = (
    "python3 -c 'import csv, json, sys; [print(json.dumps(r)) for r in csv.DictReader(sys.stdin"
    "{tabs})]' < {file} > {stem}.jsonl"
)


class Format(NamedTuple):
    """A format that is not plain text.

    Attributes:
        name: what a file of it is, as in "it is …".
        remedy: how to make text of it; {file} and {stem} are filled in.
    """

    name: str
    remedy: str


GIVE_TEXT = "give the text itself."
GIVE_MODEL = "give the text itself; a model is imported by: mlxgpt import."
PANDOC = "convert it: pandoc -t plain {file} -o {stem}.txt"
SAVE = "save it as plain text (UTF-8) there."

# (offset, bytes, format), the first that fits.
MAGIC = (
    (0, b"\x1f\x8b", Format("compressed by gzip", "decompress it: gunzip -k {file}")),
    (0, b"BZh", Format("compressed by bzip2", "decompress it: bunzip2 -k {file}")),
    (0, b"\xfd7zXZ\0", Format("compressed by xz", "decompress it: xz -dk {file}")),
    (0, b"\x28\xb5\x2f\xfd", Format("compressed by Zstandard", "decompress it: zstd -d {file}")),
    (0, b"\x04\x22\x4d\x18", Format("compressed by LZ4", "decompress it: lz4 -dk {file}")),
    (0, b"\x1f\x9d", Format("compressed by compress", "decompress it: uncompress -k {file}")),
    (0, b"7z\xbc\xaf\x27\x1c", Format("a 7z archive", "unpack it: 7z x {file}")),
    (0, b"Rar!\x1a\x07", Format("a RAR archive", "unpack it: unrar x {file}")),
    (257, b"ustar", Format("a tar archive", "unpack it: tar -xf {file}")),
    (0, b"%PDF-", Format("a PDF document", "convert it: pdftotext {file} {stem}.txt")),
    (0, b"{\\rtf", Format("an RTF document", PANDOC)),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Format("an older Microsoft Office file", SAVE)),
    (
        0,
        b"SQLite format 3\0",
        Format(
            "an SQLite database",
            "write a column to a file: sqlite3 {file} 'SELECT text FROM documents' > {stem}.txt",
        ),
    ),
    (
        0,
        b"FEA1",
        Format("a Feather file of version 1", "write it as Parquet, where it was written."),
    ),
    (0, b"ORC", Format("an ORC table", "write it as Parquet: pyarrow reads and writes both.")),
    (0, b"Obj\x01", Format("an Avro table", "write it as Parquet or JSON lines.")),
    (0, b"\x93NUMPY", Format("a NumPy array, not text", GIVE_TEXT)),
    (0, b"\x89HDF\r\n\x1a\n", Format("an HDF5 file, not text", GIVE_TEXT)),
    (0, b"GGUF", Format("a GGUF model, not text", GIVE_MODEL)),
    (8, b'{"', Format("a safetensors file, not text", GIVE_MODEL)),
    *((0, bytes([0x80, n]), Format("a Python pickle, not text", GIVE_MODEL)) for n in range(1, 6)),
    (0, b"\x89PNG\r\n\x1a\n", Format("a picture (PNG), not text", GIVE_TEXT)),
    (0, b"\xff\xd8\xff", Format("a picture (JPEG), not text", GIVE_TEXT)),
    (0, b"GIF8", Format("a picture (GIF), not text", GIVE_TEXT)),
    (0, b"II*\0", Format("a picture (TIFF), not text", GIVE_TEXT)),
    (8, b"WEBP", Format("a picture (WebP), not text", GIVE_TEXT)),
    (8, b"WAVE", Format("sound (WAV), not text", GIVE_TEXT)),
    (0, b"fLaC", Format("sound (FLAC), not text", GIVE_TEXT)),
    (0, b"OggS", Format("sound (Ogg), not text", GIVE_TEXT)),
    (0, b"ID3", Format("sound (MP3), not text", GIVE_TEXT)),
    (4, b"ftyp", Format("a video or sound (MP4), not text", GIVE_TEXT)),
    (0, b"\x7fELF", Format("a program, not text", GIVE_TEXT)),
    (0, b"\xcf\xfa\xed\xfe", Format("a program, not text", GIVE_TEXT)),
)

# Byte-order marks, the longest first.
MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# Python's name of an encoding -> iconv's.
ENCODINGS = {
    "cp1252": "WINDOWS-1252",
    "cp932": "SHIFT_JIS",
    "euc_jp": "EUC-JP",
    "gb18030": "GB18030",
    "big5": "BIG5",
    "cp949": "CP949",
    "cp1251": "WINDOWS-1251",
    "koi8_r": "KOI8-R",
}
CYRILLIC = ("cp1251", "koi8_r")
WIDE = {
    "utf_16_le": "UTF-16LE",
    "utf_16_be": "UTF-16BE",
    "utf_32_le": "UTF-32LE",
    "utf_32_be": "UTF-32BE",
}
CONTROL = bytes([*range(9), *range(14, 27), 127])  # characters that no text has


def read_head(path: Path) -> bytes:
    """A file's first bytes.

    Raises:
        OSError: if it cannot be read.
    """
    with files.naming(path), path.open("rb") as file:
        return file.read(HEAD)


def refuse_other(path: Path, head: bytes, *, is_table: bool = False) -> None:
    """Refuse a file that is neither text nor a table that is read here.

    Args:
        is_table: whether it is read as a table in binary form.

    Raises:
        UserError: naming what it is, and the command that makes text of it.
    """
    for offset, magic, format in MAGIC:
        if head.startswith(magic, offset) and _is_binary(head, magic):
            raise _refusal(path, format)
    if head.startswith(b"PK\x03\x04"):
        raise _refusal(path, _zip(path))
    if is_table:
        return
    for mark, name in MARKS:
        if head.startswith(mark):
            raise _other_encoding(path, f"{path} is {name} text", name)
    if b"\0" in head and (encoding := _wide(head)):
        raise _other_encoding(path, f"{path} is {encoding} text", encoding)
    if path.suffix.lower() in CSV:
        tabs = ', delimiter="\\t"' if path.suffix.lower() == ".tsv" else ""
        rows = CSV_TO_JSON.replace("{tabs}", tabs)
        raise _refusal(
            path,
            Format(
                "a table, not text",
                f"convert it, {rows}; or name it .txt to train on it as it stands.",
            ),
        )


def remark(path: Path) -> str | None:
    """What the user should know of a file that is read as plain text, though it is more."""
    try:
        head = read_head(path).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    except OSError:  # reading it will tell
        return None
    markup = path.suffix.lower() in (".html", ".htm", ".xhtml", ".xml")
    if markup or head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        command = _filled("pandoc -t plain {file} -o {stem}.txt", path)
        return f"{path} is read as it stands, with its tags; without them: {command}"
    return None


def not_utf8(path: Path, offset: int, sample: bytes) -> UserError:
    """What to say of a file that is not UTF-8.

    Args:
        offset: of the first byte that is not.
        sample: bytes from that one's line on, by which the encoding is guessed.
    """
    problem = f"{path} is not UTF-8 text (byte {offset:,})"
    encoding = guess_encoding(sample)
    if encoding:
        return _other_encoding(path, f"{problem}; it looks like {encoding}", encoding)
    return _other_encoding(path, problem, "WINDOWS-1252", "convert it, for instance")


def guess_encoding(sample: bytes) -> str | None:
    """The encoding that a text seems to have, by iconv's name; None where none fits."""
    return _guess(sample[:SAMPLE], ENCODINGS)


def _is_binary(head: bytes, magic: bytes) -> bool:
    """Whether magic bytes that a text could begin with begin something else."""
    if magic == b'{"':  # of safetensors: the eight bytes before it are the length of a JSON object
        return head[5:8] == bytes(3)
    if not magic.isalnum():
        return True
    return any(byte in CONTROL or byte > 127 for byte in head)


def _zip(path: Path) -> Format:
    """Which of the formats that are a ZIP archive a file is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            kind = archive.open("mimetype").read(100) if "mimetype" in names else b""
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError):
        names, kind = [], b""
    if b"epub" in kind:
        return Format("an EPUB book", PANDOC)
    if b"opendocument" in kind:
        return Format("an OpenDocument file", PANDOC)
    if "word/document.xml" in names:
        return Format("a Word document", PANDOC)
    if any(name.startswith(("xl/", "ppt/")) for name in names):
        return Format("a Microsoft Office file", SAVE)
    if any(name.endswith("data.pkl") for name in names):
        return Format("a PyTorch file, not text", GIVE_MODEL)
    if names and all(name.endswith(".npy") for name in names):
        return Format("NumPy arrays, not text", GIVE_TEXT)
    return Format("a ZIP archive", "unpack it, and give the folder: unzip {file} -d {stem}")


def _wide(head: bytes) -> str | None:
    """The encoding of a text of two or four bytes a character that begins without a mark."""
    if head.count(b"\0") <= len(head) // 8:
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
            return None  # a text with some NULs
    encoding = _guess(head, WIDE)
    text = codecs.getincrementaldecoder(encoding)().decode(head) if encoding else ""
    return None if any(ord(c) < 128 and ord(c) in CONTROL for c in text) else encoding


def _guess(sample: bytes, encodings: Mapping[str, str]) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=list(encodings)).best()
    name = best.encoding if best else ""
    if name in CYRILLIC and sum(byte > 127 for byte in sample) < len(sample) // 3:
        name = "cp1252"  # Latin letters with few others among them
    elif name in CYRILLIC:  # in the wrong one of them, small letters are capitals
        name = max(CYRILLIC, key=lambda n: sum(map(str.islower, sample.decode(n, "replace"))))
    return encodings.get(name)


def _other_encoding(
    path: Path, problem: str, encoding: str, advice: str = "convert it"
) -> UserError:
    command = _filled(f"iconv -f {encoding} -t UTF-8 {{file}} > {{stem}}-utf8{path.suffix}", path)
    return UserError(problem, f"{advice}: {command}")


def _refusal(path: Path, format: Format) -> UserError:
    return UserError(f"{path} is {format.name}", _filled(format.remedy, path))


def _filled(command: str, path: Path) -> str:
    file, stem = shlex.quote(str(path)), shlex.quote(str(path.with_suffix("")))
    return command.replace("{file}", file).replace("{stem}", stem)
