from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.data import readers, sources
from mlxgpt.data.hub import HUB_DATASETS, FileRows, SplitRows
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.utils.errors import UserError
from tests.helpers.texts import join_pieces, limit_piece_chars


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(paths: list[str]) -> list[str]:
    return join_pieces(sources.open_documents(paths))


def test_file_source(tmp_path: Path) -> None:
    text = "one\n<|endoftext|>\ntwo"
    source = sources.open_source([write(tmp_path / "a b.txt", text)])
    assert source.name == "a-b"
    assert join_pieces(source.train) == ["one\n", "\ntwo"]
    assert source.val is None
    assert not source.single
    assert source.size == len(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert source.origin == {"files": ["a b.txt"], "sha256": digest}
    assert join_pieces(source.train) == join_pieces(source.train), "it can be read again"


def test_source_with_validation_files(tmp_path: Path) -> None:
    train, val = write(tmp_path / "t.txt", "one"), write(tmp_path / "v.txt", "two")
    source = sources.open_source([train], [val])
    assert source.val is not None
    assert (join_pieces(source.train), join_pieces(source.val)) == (["one"], ["two"])
    assert source.origin["val_files"] == ["v.txt"]
    assert source.origin["val_sha256"] == hashlib.sha256(b"two").hexdigest()


def test_origins_differ_between_sources(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.txt", "one"), write(tmp_path / "2.txt", "two")
    same = write(tmp_path / "deeper" / "1.txt", "one")
    requests: list[tuple[list[str], list[str]]]
    requests = [([first], []), ([second], []), ([first, second], []), ([second, first], [])]
    requests += [([first], [second]), ([second], [first])]
    origins = [json.dumps(sources.open_source(*request).origin) for request in requests]
    assert len(set(origins)) == len(origins)
    assert sources.open_source([same]).origin == sources.open_source([first]).origin


def test_folder_source_reads_all_text_files_in_order(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "f" / "b.txt", "second")
    write(tmp_path / "f" / "a.txt", "first")
    write(tmp_path / "f" / "deeper" / "e.ndjson", '{"text": "sixth"}')
    write(tmp_path / "f" / "c.JSONL", '{"text": "third"}\n{"text": "fourth"}')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fifth"]}), tmp_path / "f" / "d.parquet")
    write(tmp_path / "f" / "not.md", "no")
    expected = ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert read([str(tmp_path / "f")]) == expected
    source = sources.open_source([str(tmp_path / "f")])
    assert join_pieces(source.train) == expected
    assert source.size > 50


def test_unexpanded_glob_pattern(home: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        write(home / "texts" / name, name)
    write(home / "odd[1].txt", "odd")
    assert read(["texts/*.txt"]) == ["a.txt", "b.txt"]
    assert read(["texts/*"]) == ["a.txt", "b.txt", "c.md"], "what is named is taken for text"
    assert read(["odd[1].txt"]) == ["odd"], "a file of that very name"
    with pytest.raises(UserError, match=r"no file matches 'texts/\*.rst'"):
        read(["texts/*.rst"])


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file, folder or dataset named 'shakespear'"):
        sources.open_source(["shakespear"])
    with pytest.raises(UserError, match=r"no \.txt, \.jsonl, \.ndjson, \.parquet files found in"):
        sources.open_source([str(tmp_path)])


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "one")

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources.files, "sha256_file", refuse)
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: Permission denied"):
        sources.open_source([str(tmp_path)])


def test_synthetic_stories_have_the_requested_size() -> None:
    source = sources.open_source(["synthetic"], megabytes=0.2)
    assert source.val is not None
    train, val = join_pieces(source.train), join_pieces(source.val)
    assert sum(map(len, train)) == pytest.approx(200_000, abs=1000)
    assert sum(map(len, val)) == pytest.approx(2_000, abs=1000)
    assert source.size == 200_000
    assert not set(train) & set(val)
    assert join_pieces(source.train) == train, "it can be read again"
    assert not source.single
    assert source.is_homogeneous


@pytest.mark.parametrize("megabytes", [0.0, -1.0, float("nan"), 1e9])
def test_megabytes_out_of_range_are_refused(megabytes: float) -> None:
    with pytest.raises(UserError, match="is out of range"):
        sources.open_source(["synthetic"], megabytes=megabytes)


def test_options_that_a_built_in_dataset_does_not_support_are_refused() -> None:
    with pytest.raises(UserError, match="synthetic has its own validation split"):
        sources.open_source(["synthetic"], ["val.txt"])
    with pytest.raises(UserError, match="supported for synthetic only"):
        sources.open_source(["shakespeare"], megabytes=1)


def test_file_named_like_a_built_in_dataset_takes_precedence(home: Path) -> None:
    (home / "synthetic").write_text("0123456789")
    assert join_pieces(sources.open_source(["synthetic"]).train) == ["0123456789"]


@pytest.mark.parametrize("name", sorted(HUB_DATASETS))
def test_hub_dataset_is_read_from_its_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a single-document dataset, the rows are pieces of that document."""
    files = [Path(write(tmp_path / f"{n}.jsonl", f'{{"text": "row {n}"}}')) for n in range(3)]
    rows = SplitRows(
        FileRows(files[:2]), FileRows(files[2:]) if HUB_DATASETS[name].val else None, "abc"
    )
    monkeypatch.setattr(sources.hub, "load_hub_rows", lambda dataset: rows)
    source = sources.open_source([name])

    def pieces(side: Iterable[int]) -> list[DocumentPiece]:
        return [DocumentPiece(f"row {n}", last=name != "shakespeare") for n in side]

    assert list(source.train) == pieces((0, 1))
    assert source.val is None if not rows.val else list(source.val or ()) == pieces((2,))
    assert source.single == (name == "shakespeare")
    assert source.size == sum(map(readers.estimate_text_bytes, files[:2]))
    assert source.origin == {**sources.corpus_origin([name]), "revision": "abc"}


@given(
    st.lists(st.integers(1, 30), max_size=8),
    st.lists(st.integers(0, 8), max_size=3),
    st.integers(0, 9),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_row_range_spans_files_and_keeps_documents_whole(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    cuts: list[int],
    start: int,
    stop: int | None,
) -> None:
    """Regardless of document length and file boundaries."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [f"{n} " + "word " * length for n, length in enumerate(lengths)]
    ends = [0, *sorted(cuts), len(rows)]
    paths = []
    for n, (begin, end) in enumerate(itertools.pairwise(ends)):
        lines = [json.dumps({"text": row}) for row in rows[begin:end]]
        paths.append(Path(write(folder / f"{n}.jsonl", "\n".join(lines))))
    with limit_piece_chars(20):
        assert (
            join_pieces(sources._FileDocuments(FileRows(paths, (start, stop)))) == rows[start:stop]
        )


def test_hub_dataset_cannot_be_mixed_with_other_sources() -> None:
    with pytest.raises(UserError, match="cannot be mixed with other sources"):
        sources.open_source(["hf:a/b", "my.txt"])
    assert sources.data_folder_name(["hf:owner/name.v2:story text"]) == "owner-name.v2-story-text"


def test_real_shakespeare_has_the_pinned_hash(shakespeare: Path) -> None:
    source = sources.open_source([str(shakespeare)])
    assert source.origin["sha256"] == HUB_DATASETS["shakespeare"].sha256
    assert [len(text) for text in join_pieces(source.train)] == [1_115_394]


def test_pipe_is_refused_as_a_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is not a regular file"):
        sources.open_source([str(tmp_path / "pipe.txt")])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (["shakespeare"], "karpathy/tiny_shakespeare"),
        (["hf:a/b:story"], "a/b, column story"),
        (["synthetic"], "the synthetic stories"),
    ],
)
def test_origin_descriptions(source: list[str], words: str) -> None:
    assert sources.describe_origin(sources.corpus_origin(source)) == words
    assert sources.describe_origin({"files": ["a.txt", "b.txt"], "sha256": "0"}) == "a.txt, b.txt"
    assert sources.describe_origin({"nanogpt": "arrays"}) == "nanoGPT arrays in arrays"


LONG_STEM = "é" * 125


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a b.txt", "a-b"),
        ("deep/a - b (2)_c.v1.txt", "a---b-2-_c.v1"),
        ("日本語.txt", "日本語"),
        ("русский текст.txt", "русский-текст"),
        ("हिन्दी.txt", "हिन्दी"),
        ("café.txt", "café"),
        ("cafe\u0301.txt", "café"),
        ("한국어.txt", "한국어"),
        ("\u1112\u1161\u11ab.txt", "한"),
        (os.fsdecode(b"caf\xe9.txt"), "caf"),
        ("", "text"),
        ("..", "text"),
        ("stories.jsonl:story", "stories-story"),
        ("hf:owner/name", "owner-name"),
    ],
)
def test_data_folder_is_named_after_its_source(path: str, name: str) -> None:
    assert sources.data_folder_name([path]) == name
    assert name.isascii() <= (sources.legacy_data_folder_name([path]) in (name, "stories")), (
        "as it always was"
    )


def test_names_without_valid_characters_get_different_hashes() -> None:
    paths = [
        "🙂.txt",
        "🎉.txt",
        "!!!.txt",
        "~.txt",
        os.fsdecode(b"\xe9.txt"),
        os.fsdecode(b"\xe8.txt"),
    ]
    names = {sources.data_folder_name([path]) for path in paths}
    assert len(names) == len(paths)
    assert all(re.fullmatch("text-[0-9a-f]{8}", name) for name in names)


@given(st.text(max_size=300))
def test_data_folder_names_are_short_and_safe(stem: str) -> None:
    stem = stem.replace("/", "").replace("\0", "")
    name = sources.data_folder_name([f"{stem}.txt"])
    assert 0 < len(name.encode()) <= 200
    assert name.isprintable()
    assert not set(name) & set("/:*?\"'` \\")
    assert not name.startswith((".", "-"))


def test_long_names_are_shortened_and_differ(tmp_path: Path) -> None:
    names = {sources.data_folder_name([f"{LONG_STEM}{letter}.txt"]) for letter in "ab"}
    assert len(names) == 2
    assert all(name.startswith("éééé") for name in names)
    nfd = unicodedata.normalize("NFD", f"{LONG_STEM}a.txt")
    assert sources.data_folder_name([nfd]) in names, "a file system's form does not matter"
    ascii_name = "x" * 180
    assert sources.data_folder_name([f"{ascii_name}.txt"]) == ascii_name


def write_parquet(path: Path, columns: dict[str, list[str]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_column_is_chosen_with_a_colon_after_the_file(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"story": "one", "title": "1"}')
    rows = write_parquet(tmp_path / "b.parquet", {"title": ["2"], "text": ["two"]})
    assert read([f"{lines}:story", rows]) == ["one", "two"]
    assert read([f"{lines}:title", f"{lines}:story", f"{rows}:title"]) == ["1", "one", "2"]
    assert read([f"{tmp_path}:title"]) == ["1", "2"], "of all tables in a folder"
    assert read([f"{tmp_path}/*.jsonl:story"]) == ["one"]
    origins = [sources.open_source([f"{lines}:{name}"]).origin for name in ("story", "title")]
    assert origins[0] != origins[1]
    with pytest.raises(UserError, match="has no column 'text'; available: story, title") as excinfo:
        read([lines])
    assert f"{lines}:COLUMN" in excinfo.value.remedy


def test_file_name_with_a_colon_takes_precedence_over_a_column(tmp_path: Path) -> None:
    assert read([write(tmp_path / "a:b.txt", "one")]) == ["one"]
    with pytest.raises(UserError, match="no file, folder or dataset named"):
        read([str(tmp_path / "gone:b")])


def test_skipped_files_of_a_folder_are_logged(tmp_path: Path, notes: list[str]) -> None:
    for name in ("a.txt", "._a.txt", "b.md"):
        write(tmp_path / "texts" / name, name)
        write(tmp_path / "val" / name, name)
    source = sources.open_source([str(tmp_path / "texts")], [str(tmp_path / "val")])
    assert join_pieces(source.train) == ["a.txt"]
    assert [line.rpartition(": ")[2] for line in notes] == ["1 .md, 1 hidden"] * 2
    assert join_pieces(sources.open_documents([str(tmp_path / "val")])) == ["a.txt"]
    assert len(notes) == 3


def test_pattern_does_not_match_hidden_or_temporary_files(home: Path) -> None:
    for name in ("a.txt", "a.txt~", ".b.txt", "Thumbs.db"):
        write(home / "texts" / name, name)
    assert read(["texts/*"]) == ["a.txt"]


def test_html_page_is_logged(tmp_path: Path, notes: list[str]) -> None:
    page = write(tmp_path / "page.html", "<!DOCTYPE html><p>Once upon a time</p>")
    assert join_pieces(sources.open_source([page]).train) == [
        "<!DOCTYPE html><p>Once upon a time</p>"
    ]
    assert "including its markup" in notes[0]


def test_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/gone/a.txt")
    with pytest.raises(UserError, match=r"a\.txt is a broken link: /gone/a\.txt does not exist"):
        sources.open_source([str(tmp_path / "a.txt")])


def test_origins_in_nfc_and_nfd_are_equal() -> None:
    nfc, nfd = ({"files": [name], "sha256": "1"} for name in ("café.txt", "cafe\u0301.txt"))
    assert sources.canonicalize_origin(nfc) == sources.canonicalize_origin(nfd)
    assert sources.canonicalize_origin(nfc) != sources.canonicalize_origin({**nfc, "sha256": "2"})


def test_origins_ignore_the_case_of_files_but_not_of_columns() -> None:
    lower, upper = ({"files": [name], "sha256": "1"} for name in ("my.txt", "MY.txt"))
    assert sources.canonicalize_origin(lower) == sources.canonicalize_origin(upper)
    columns = ({"hub": "owner/name", "column": name} for name in ("text", "Text"))
    assert len({*map(sources.canonicalize_origin, columns)}) == 2


def test_tilde_without_such_a_user_is_a_file_name(home: Path) -> None:
    assert read([write(home / "~.txt", "one")]) == ["one"]
    assert read(["~.txt"]) == ["one"]
    with pytest.raises(UserError, match=r"no file, folder or dataset named '~nobody-here/a\.txt'"):
        read(["~nobody-here/a.txt"])
