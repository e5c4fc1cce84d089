"""File formats, detected in files written by the libraries and programs of those formats."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data import formats, readers
from mlxgpt.data.normalize import normalize_text
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import join_pieces

TEXT = "Once upon a time there was a mouse who liked to read.\n" * 30


def zip_writer(**contents: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name.replace("__", "/").replace("_xml", ".xml"), content)

    return write


def bytes_writer(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT.encode()))


def write_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE documents (text)")
    connection.commit()
    connection.close()


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.arange(9))


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(9))


def write_safetensors(path: Path) -> None:
    mx.save_safetensors(str(path), {"a": mx.zeros((3, 3))})
    path.with_name(path.name + ".safetensors").rename(path)


def write_gguf(path: Path) -> None:
    mx.save_gguf(str(path), {"a": mx.zeros((3, 3))}, {})
    path.with_name(path.name + ".gguf").rename(path)


OTHER_FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed with gzip": (bytes_writer(gzip.compress(TEXT.encode())), "gunzip -k "),
    "compressed with bzip2": (bytes_writer(bz2.compress(TEXT.encode())), "bunzip2 -k "),
    "compressed with xz": (bytes_writer(lzma.compress(TEXT.encode())), "xz -dk "),
    "compressed with Zstandard": (bytes_writer(b"\x28\xb5\x2f\xfd\x24\x00"), "zstd -d "),
    "a ZIP archive": (zip_writer(a=TEXT), "unzip "),
    "a Word document": (zip_writer(word__document_xml="<w:t/>"), "pandoc "),
    "an EPUB book": (zip_writer(mimetype="application/epub+zip"), "pandoc "),
    "an OpenDocument file": (
        zip_writer(mimetype="application/vnd.oasis.opendocument.text"),
        "pandoc ",
    ),
    "a Microsoft Office file": (zip_writer(xl__workbook_xml="<x/>"), "save it as plain text"),
    "a PyTorch file": (zip_writer(**{"a/data.pkl": ""}), "mlxgpt import"),
    "a tar archive": (write_tar, "tar -xf "),
    "a 7z archive": (bytes_writer(b"7z\xbc\xaf\x27\x1c\0\4"), "7z x "),
    "a PDF document": (bytes_writer(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), "pdftotext "),
    "an RTF document": (bytes_writer(rb"{\rtf1\ansi Once upon a time}"), "pandoc "),
    "an older Microsoft Office file": (
        bytes_writer(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(99)),
        "save it as plain text",
    ),
    "an SQLite database": (write_database, "sqlite3 "),
    "a NumPy array": (write_npy, "use a text file"),
    "NumPy arrays": (write_npz, "use a text file"),
    "a safetensors file": (write_safetensors, "mlxgpt import"),
    "a GGUF model": (write_gguf, "mlxgpt import"),
    "a Python pickle": (bytes_writer(pickle.dumps({"text": TEXT})), "use a text file"),
    "an image (PNG)": (bytes_writer(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "use a text file"),
    "an image (GIF)": (bytes_writer(b"GIF89a\1\0\1\0"), "use a text file"),
    "an audio file (WAV)": (bytes_writer(b"RIFF\x24\0\0\0WAVEfmt \x10\0"), "use a text file"),
}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".bin"])
@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_detected_whatever_the_file_name(
    tmp_path: Path, name: str, suffix: str
) -> None:
    write, remedy = OTHER_FORMATS[name]
    path = tmp_path / f"my file{suffix}"
    write(path)
    with pytest.raises(UserError) as excinfo:
        list(readers.read_documents(path))
    assert excinfo.value.problem.startswith(f"{path} is {name}")
    assert "\n" not in excinfo.value.problem + excinfo.value.remedy
    assert remedy in excinfo.value.remedy
    if remedy.endswith(" "):  # a shell command with the quoted file name
        assert f"'{path}'" in excinfo.value.remedy


@pytest.mark.parametrize(
    "text",
    ["BZh is a name", "GIF8 is one as well", "ID3 tags", "ORC and GGUF", "1234ftyp", "RIFF1234WAVE",
     '12345678{"a": 1}', "PARIS", "PK and more", "7z"],
)  # fmt: skip
def test_text_may_start_like_another_format(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.txt"
    path.write_text(text)
    assert join_pieces(readers.read_documents(path)) == [text]


JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 5
CHINESE = "红楼梦第一回甄士隐梦幻识通灵贾雨村风尘怀闺秀此开卷第一回也。作者自云。" * 5
GERMAN = "Die Straße führt über die Brücke nach Köln, wo man früh aufsteht. " * 5
FRENCH = "L’œuvre du poète — là-bas, à côté de la forêt… été très intéressés. " * 5
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. " * 5
KOREAN = "모든 행복한 가정은 서로 닮았고, 불행한 가정은 제각각 나름으로 불행하다. " * 5


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "latin-1"),
        (FRENCH, "cp1252"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        (CHINESE, "gb18030"),
        (KOREAN, "euc_kr"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        *((TEXT, f"utf-{bits}{order}") for bits in (16, 32) for order in ("", "-le", "-be")),
        (CHINESE, "utf-16"),
        (CHINESE + "\n", "utf-16-le"),
        (JAPANESE + "\r\n", "utf-16-be"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_suggested_command_converts_other_encodings(
    tmp_path: Path, text: str, encoding: str, suffix: str
) -> None:
    path = tmp_path / f"a book{suffix}"
    path.write_bytes(
        (text if suffix == ".txt" else json.dumps(text, ensure_ascii=False)).encode(encoding)
    )
    with pytest.raises(UserError) as excinfo:
        list(readers.read_documents(path))
    assert str(path) in excinfo.value.problem
    _, _, command = excinfo.value.remedy.partition(": ")
    assert command.startswith("iconv -f ")
    subprocess.run(command, shell=True, check=True)
    (converted,) = readers.read_documents(tmp_path / f"a book-utf8{suffix}")
    assert converted.text == normalize_text(text)


def test_utf8_byte_order_mark_and_single_nul_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8-sig")
    assert join_pieces(readers.read_documents(path)) == [TEXT]
    path.write_text(TEXT + "\0" + TEXT)
    with pytest.raises(UserError, match=rf"is not text: byte {len(TEXT):,} is NUL") as excinfo:
        list(readers.read_documents(path))
    assert "tr -d" in excinfo.value.remedy


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_suggested_command_converts_a_csv_table(
    tmp_path: Path, suffix: str, separator: str
) -> None:
    path = tmp_path / f"my stories{suffix}"
    path.write_text(f'text{separator}n\n"Once, upon\na time"{separator}1\ntwo{separator}2\n')
    with pytest.raises(UserError, match="is a table, not text") as excinfo:
        list(readers.read_documents(path))
    command = excinfo.value.remedy.removeprefix("convert it: ").split("; or rename it to .txt")[0]
    path_with_python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path_with_python})
    assert join_pieces(readers.read_documents(tmp_path / "my stories.jsonl")) == [
        "Once, upon\na time",
        "two",
    ]


@pytest.mark.parametrize(
    ("name", "text", "noted"),
    [
        ("a.html", "<p>Once", True),
        ("a.txt", "\ufeff\n <!DOCTYPE html><html>", True),
        ("a.xml", "<a/>", True),
        ("a.md", "# Once", False),
        ("a.txt", "a <html> of sorts", False),
    ],
)
def test_markup_is_detected(tmp_path: Path, name: str, text: str, noted: bool) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert bool(formats.markup_notice(tmp_path / name)) == noted


def test_file_with_the_suffix_of_another_format_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.table({"text": ["one", "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.txt")
    pyarrow.feather.write_feather(table, tmp_path / "b.data")
    (tmp_path / "c.json").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("one", "two"))
    )
    for name in ("a.txt", "b.data", "c.json"):
        assert join_pieces(readers.read_documents(tmp_path / name)) == ["one", "two"]


@given(st.binary(min_size=30, max_size=300))
def test_binary_data_is_not_taken_for_utf16_or_utf32(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """Whatever follows the start of an Arrow stream or of unknown bytes."""
    path = tmp_path_factory.mktemp("t") / "t.arrow"
    stream = bytes.fromhex("ffffffff10000000") + content
    path.write_bytes(stream)
    with pytest.raises(UserError, match=r"not a complete Arrow file|no column"):
        list(readers.read_documents(path))
    path.with_suffix(".txt").write_bytes(bytes(range(1, 9)) + bytes(40) + content)
    with pytest.raises(UserError, match="is not text: byte 8 is NUL"):
        list(readers.read_documents(path.with_suffix(".txt")))
