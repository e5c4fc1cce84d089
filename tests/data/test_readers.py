from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data import readers
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.tokenizers.base import END_OF_TEXT
from mlxgpt.data.tokenizers.bpe import BPETokenizer
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import join_pieces, limit_piece_chars, read_like_python, remove_nul, texts

Folders = pytest.TempPathFactory
# Separators, parts of separators, and characters of one to four bytes.
fragments = st.sampled_from(
    [END_OF_TEXT, "<|endof", "text|>", "<", "a", " ", "\n", "\r\n", "\r", "word ", "é", "€", "🙂"]
)
fragment_texts = st.lists(fragments, max_size=40).map("".join)
lengths = st.integers(14, 40)


def write_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def read(path: Path) -> list[str]:
    return join_pieces(readers.read_documents(path))


@given(fragment_texts, lengths)
def test_text_file_is_split_at_separators(
    tmp_path_factory: Folders, text: str, length: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(text.encode())
    with limit_piece_chars(length):
        assert read(path) == read_like_python(text).split(END_OF_TEXT)


@given(
    st.lists(st.sampled_from([b"a", b"bc\n", "é".encode(), "🙂".encode(), b"\xff", b"\xe2\x82"])),
    lengths,
)
def test_invalid_utf8_is_reported_with_its_byte_offset(
    tmp_path_factory: Folders, parts: list[bytes], length: int
) -> None:
    content = b"".join(parts)
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(content)
    with limit_piece_chars(length):
        try:
            expected = [content.decode()]
        except UnicodeDecodeError as error:
            with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {error.start}\)"):
                read(path)
        else:
            assert read(path) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("Straße".encode("latin-1"), r"t\.txt is not UTF-8 text \(byte 4\)"),
        (("x" * 3_000_000 + "é").encode()[:-1], r"not UTF-8 text \(byte 3,000,000\)"),
        (b"x" * 3_000_000 + b"\0", "not text: byte 3,000,000 is NUL"),
        (b"to be\0or not", r"t\.txt is not text: byte 5 is NUL"),
        ("to be".encode("utf-16"), r"t\.txt is UTF-16 text"),
    ],
)
def test_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read(path)


@given(fragment_texts.map(lambda text: "\ufeff" + text), lengths)
def test_line_endings_and_byte_order_marks_are_normalized(
    tmp_path_factory: Folders, text: str, length: int
) -> None:
    folder = tmp_path_factory.mktemp("t")
    (folder / "t.TXT").write_bytes(text.encode())
    (folder / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}).encode())
    write_parquet(folder / "t.parquet", {"text": [text]})
    with limit_piece_chars(length):
        assert read(folder / "t.TXT") == read_like_python(text).split(END_OF_TEXT)
        assert read(folder / "t.jsonl") == read(folder / "t.parquet") == [read_like_python(text)]


def test_offset_of_invalid_utf8_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffabc\r\n".encode() + b"\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 8\)"):
        read(path)


@given(texts, lengths)
def test_pieces_have_the_same_tokens_as_the_document(
    small_bpe: BPETokenizer, text: str, length: int
) -> None:
    with limit_piece_chars(length):
        pieces = list(readers.split_into_pieces(text))
        assert join_pieces(pieces) == [text]
        if max(len(piece.text) for piece in pieces) >= 3 * length:
            return  # a word so long that it had to be cut
        tokens = [token for piece in pieces for token in small_bpe.encode(piece.text)]
        assert tokens == small_bpe.encode(text).tolist()


@given(st.text("a \r\n\t", max_size=200), lengths)
def test_pieces_are_no_longer_than_necessary(text: str, length: int) -> None:
    with limit_piece_chars(length):
        for piece, _ in readers.split_into_pieces(text):
            assert len(piece) <= 4 * length
            if len(piece) > length:  # there was no place to cut
                assert not any(
                    piece[n] in " \t\r\n" and not piece[n - 1].isspace() for n in range(1, length)
                )


def test_text_after_a_long_word_is_cut_at_whitespace() -> None:
    with limit_piece_chars(16):
        words = ["x" * 30, " short", " words", " and", " more", " of", " them", " " + "y" * 40]
        pieces = [piece.text for piece in readers.split_into_pieces("".join(words) * 2)]
        assert all(piece.startswith((" ", "x")) for piece in pieces)
        assert "x" * 30 in "".join(pieces[:1])
        assert max(map(len, pieces)) <= 64
        long_word_pieces = [piece.text for piece in readers.split_into_pieces("z" * 1000)]
        assert "".join(long_word_pieces) == "z" * 1000
        assert max(map(len, long_word_pieces)) <= 64


@pytest.mark.parametrize("unit", ["abcdefghi ", "a,b\r\n", "x"])
def test_line_of_fifty_megabytes_is_split_into_pieces(tmp_path: Path, unit: str) -> None:
    """Also without a place to cut. Finding the places takes linear time."""
    count = 50_000_000 // len(unit)
    path = tmp_path / "t.txt"
    path.write_text(unit * count, newline="")
    expected = len(read_like_python(unit)) * count
    length = pieces = 0
    for text, _ in readers.read_documents(path):
        assert len(text) <= readers.MAX_WORD_CHARS
        length += len(text)
        pieces += 1
    assert length == expected
    assert pieces >= 12


def test_json_line_of_fifty_megabytes_is_split_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    document = "abcdefghi " * 5_000_000
    path.write_text(json.dumps({"text": document}) + "\n" + '{"text": "next"}')
    pieces = list(readers.read_documents(path))
    assert join_pieces(pieces) == [document, "next"]
    assert max(len(piece.text) for piece in pieces) <= readers.MAX_PIECE_CHARS


rows = st.lists(st.one_of(texts, fragment_texts).map(remove_nul), max_size=6)


@given(rows, st.booleans())
def test_json_lines_are_documents(tmp_path_factory: Folders, rows: list[str], escape: bool) -> None:
    """Special tokens in them are plain text."""
    path = tmp_path_factory.mktemp("t") / "t.JSONL"
    lines = [json.dumps({"id": 1, "text": row}, ensure_ascii=escape) for row in rows]
    path.write_bytes("\n \r\n".join(lines).encode())
    assert read(path) == [read_like_python(row) for row in rows]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', r"t\.ndjson, line 3 is not a JSON object"),
        (b"[" * 100_000, "line 3 is not a JSON object"),
        (b'["text"]', "line 3 is not a JSON object"),
        (b'{"text": "\xff"}', r"t\.ndjson is not UTF-8 text \(byte 25\)"),
        (b'{"story": "a", "n": 1}', "line 3 has no column 'text'; available: story, n"),
        (b"{}", "line 3 has no column 'text'; available: none"),
        (b'{"text": 5}', "line 3: text is int, not text"),
        (b'{"text": ["a"]}', "line 3: text is list, not text"),
        (b'{"text": "a\\u0000b"}', "line 3 contains a NUL character"),
        (b'{"text": "\\ud800"}', "line 3 is not valid Unicode"),
    ],
)
def test_json_line_without_text_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "t.ndjson"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=problem):
        read(path)


def test_null_and_empty_texts_are_empty_documents(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    assert read(path) == ["", "", "a"], "each row is one, so that rows can be counted"


@given(st.lists(st.one_of(st.none(), texts.map(remove_nul)), max_size=9), st.integers(1, 4))
def test_parquet_rows_are_documents(
    tmp_path_factory: Folders, values: list[str | None], group: int
) -> None:
    import pyarrow

    text = pyarrow.array(values, pyarrow.string())
    path = write_parquet(
        tmp_path_factory.mktemp("t") / "t.parquet",
        {"id": list(range(len(values))), "text": text},
        row_group_size=group,
    )
    assert read(path) == [read_like_python(value or "") for value in values]


def test_table_with_more_rows_than_one_batch(tmp_path: Path) -> None:
    values = [f"story {n}" for n in range(2 * readers.ROWS_PER_BATCH + 1)]
    assert read(write_parquet(tmp_path / "t.parquet", {"text": values})) == values


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"story": ["a"], "n": [1]}, r"t\.parquet has no column 'text'; available: story, n"),
        ({"text": ["a", None, "b\0"]}, r"t\.parquet, row 3 contains a NUL character"),
        ({"text": [1, 2]}, "row 1: text is int, not text"),
        ({"text": [b"\xff"]}, "row 1: text is bytes, not text"),
    ],
)
def test_table_without_text_is_named(
    tmp_path: Path, columns: dict[str, list[Any]], problem: str
) -> None:
    path = write_parquet(tmp_path / "t.parquet", columns)
    with pytest.raises(UserError, match=problem):
        read(path)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "begun late": lambda content: content[len(content) // 2 :],
    "empty": lambda content: b"",
    "text": lambda content: b"once upon a time, and so on and on",
    "rotten": lambda content: (
        content[:4] + bytes(len(content) // 2) + content[len(content) // 2 + 4 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parquet_file_is_a_one_line_error(tmp_path: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"text": [f"story {n}" for n in range(999)]})
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    readers.estimate_text_bytes(path)
    with pytest.raises(UserError, match=r"t\.parquet is not a complete Parquet file") as excinfo:
        read(path)
    assert "\n" not in excinfo.value.problem


def test_arrow_streams_are_read(tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "t.arrow"
    table = pyarrow.table({"text": ["one", None, "two" * 10]})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    assert read(path) == ["one", "", "two" * 10]


def test_arrow_and_feather_files_are_read(tmp_path: Path) -> None:
    """Including compressed files, dictionary columns, and several batches."""
    import pyarrow
    import pyarrow.feather

    texts = ["one", None, "one", "two" * 10]
    table = pyarrow.table({"n": [1, 2, 3, 4], "text": texts})
    with pyarrow.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=2)
    pyarrow.feather.write_feather(table, str(tmp_path / "t.feather"), compression="zstd")
    categories = table.set_column(1, "text", table["text"].dictionary_encode())
    pyarrow.feather.write_feather(categories, str(tmp_path / "c.feather"))
    for name in ("t.arrow", "t.feather", "c.feather"):
        assert read(tmp_path / name) == ["one", "", "one", "two" * 10]


@pytest.mark.parametrize("kind", ["new_stream", "new_file"])
def test_missing_arrow_column_lists_the_available_ones(tmp_path: Path, kind: str) -> None:
    import pyarrow

    path = tmp_path / "t.arrow"
    table = pyarrow.table({"story": ["one"], "n": [1]})
    with getattr(pyarrow.ipc, kind)(str(path), table.schema) as out:
        out.write_table(table)
    with pytest.raises(
        UserError, match=r"t\.arrow has no column 'text'; available: story, n"
    ) as excinfo:
        read(path)
    assert f"{path}:COLUMN" in excinfo.value.remedy
    assert join_pieces(readers.read_documents(path, "story")) == ["one"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one", "n": 1}, {"text": "two\\r\\n"}]',
        '["one", "two\\n"]',
        '\ufeff[\n "one",\n {"text": "two\\n"}]\n',
        '{"text": "one"}\n{"text": "two\\n"}\n',
        '"one"\r\n"two\\n"',
    ],
)
def test_json_file_is_an_array_or_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content, encoding="utf-8", newline="")
    assert read(path) == ["one", "two\n"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"data": ["one"]}', r"t\.json, entry 1 has no column 'text'; available: data"),
        ('["one", 2]', r"t\.json, entry 2 is not a JSON object"),
        ('["one", {"text": 2}]', r"t\.json, entry 2: text is int, not text"),
        ('["one", ', r"t\.json, line 1 is not a JSON object"),
        ("[" * 100_000, "line 1 is not a JSON object"),
        ("Once upon a time", "line 1 is not a JSON object"),
    ],
)
def test_json_file_without_text_is_named(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        read(tmp_path / "t.json")


def test_one_json_object_may_take_several_lines(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"text": "one"}, indent=2))
    assert read(tmp_path / "t.json") == ["one"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".arrow"])
def test_file_name_may_contain_bytes_that_are_not_utf8(tmp_path: Path, suffix: str) -> None:
    import pyarrow

    plain, path = tmp_path / f"t{suffix}", tmp_path / os.fsdecode(b"caf\xe9" + suffix.encode())
    if suffix == ".parquet":
        write_parquet(plain, {"text": ["one"]})
    elif suffix == ".arrow":
        table = pyarrow.table({"text": ["one"]})
        with pyarrow.ipc.new_file(str(plain), table.schema) as out:
            out.write_table(table)
    else:
        plain.write_text("one" if suffix == ".txt" else '{"text": "one"}')
    try:
        plain.rename(path)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert read(path) == ["one"]
    assert readers.estimate_text_bytes(path) > 0


@pytest.mark.parametrize("damage", ["cut short", "empty", "text"])
def test_damaged_arrow_file_is_named_with_its_folder(tmp_path: Path, damage: str) -> None:
    import pyarrow

    path = tmp_path / "cache" / "t.arrow"
    path.parent.mkdir()
    table = pyarrow.table({"text": [f"story {n}" for n in range(999)]})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"t\.arrow is not a complete Arrow file") as excinfo:
        read(path)
    assert f"once its folder, {path.parent}, is moved away" in excinfo.value.remedy


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"gone\{suffix}"):
        read(tmp_path / f"gone{suffix}")


def test_size_of_text_is_estimated_without_reading_it(tmp_path: Path) -> None:
    text = "a b c d " * 1000
    plain = tmp_path / "t.txt"
    plain.write_text(text)
    assert readers.estimate_text_bytes(plain) == len(text)
    table = write_parquet(tmp_path / "t.parquet", {"text": [text, text[::-1]]}, row_group_size=1)
    assert 0.9 < readers.estimate_text_bytes(table) / (2 * len(text)) < 1.2
    assert table.stat().st_size < len(text), "though it is compressed"


def test_last_piece_of_a_document_is_marked() -> None:
    with limit_piece_chars(16):
        assert list(readers.split_into_pieces("a document of more than one piece")) == [
            DocumentPiece("a document of", last=False),
            DocumentPiece(" more than one", last=False),
            DocumentPiece(" piece", last=True),
        ]
    assert list(readers.split_into_pieces("")) == [DocumentPiece("", last=True)]
