from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlxgpt.data.folders import expand_pattern, find_text_files, is_ignored

SUFFIXES = (".txt", ".jsonl")
LEFTOVERS = [
    "._a.txt",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "a.txt~",
    "#a.txt#",
    ".#a.txt",
    ".a.txt.swp",
    "~$a.txt",
    ".a.txt",
    ".git/a.txt",
    ".ipynb_checkpoints/a.txt",
    ".Trash/a.txt",
    "__MACOSX/._a.txt",
    "__MACOSX/a.txt",
    "@eaDir/a.txt",
    ".hidden/deeper/a.jsonl",
]


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
    return path


def test_hidden_and_temporary_files_are_skipped(tmp_path: Path, notes: list[str]) -> None:
    expected = [write(tmp_path / name) for name in ("a.txt", "b/c.JSONL", "b/d.txt")]
    for name in LEFTOVERS:
        write(tmp_path / name)
    assert find_text_files(tmp_path, SUFFIXES) == expected
    assert notes == [f"skipped in {tmp_path}: 4 hidden"], "files only, that would be text"


def test_folder_inside_a_hidden_folder_is_read(tmp_path: Path) -> None:
    """A folder that is named explicitly is read."""
    text_path = write(tmp_path / ".cache" / "texts" / "a.txt")
    assert find_text_files(text_path.parent, SUFFIXES) == [text_path]


def test_folder_named_like_a_file_is_read(tmp_path: Path) -> None:
    text_path = write(tmp_path / "chapter.txt" / "one.txt")
    assert find_text_files(tmp_path, SUFFIXES) == [text_path]


def test_skipped_files_are_logged_in_one_line(tmp_path: Path, notes: list[str]) -> None:
    for name in ("a.txt", "b.md", "c.md", "d/e.MD", "f.csv", "g.json.gz", "LICENSE"):
        write(tmp_path / name)
    find_text_files(tmp_path, SUFFIXES)
    (line,) = notes
    assert line.startswith(f"skipped in {tmp_path}: 3 .md, ")
    assert set(line.split(": ")[1].split(", ")) == {
        "3 .md",
        "1 .csv",
        "1 .gz",
        "1 without extension",
    }


def test_broken_links_and_links_to_folders_are_logged(tmp_path: Path, notes: list[str]) -> None:
    target = write(tmp_path / "elsewhere" / "a.txt")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "good.txt").symlink_to(target)
    (folder / "gone.txt").symlink_to("/gone/b.txt")
    (folder / "more").symlink_to(target.parent)
    os.mkfifo(folder / "pipe.txt")
    assert find_text_files(folder, SUFFIXES) == [folder / "good.txt"]
    assert f"{folder / 'gone.txt'} is a broken link to /gone/b.txt" in notes[0]
    assert f"{folder / 'more'} is a link to a folder" in notes[0]
    assert "1 .txt" in notes[0], "the pipe"


def test_nothing_is_logged_if_no_file_is_skipped(tmp_path: Path, notes: list[str]) -> None:
    write(tmp_path / "a.txt")
    assert find_text_files(tmp_path, SUFFIXES) == [tmp_path / "a.txt"]
    assert notes == []


def test_log_line_is_shortened_for_many_skipped_files(tmp_path: Path, notes: list[str]) -> None:
    for n in range(50):
        write(tmp_path / f"a.k{n}")
        (tmp_path / f"l{n}.txt").symlink_to("/gone")
    find_text_files(tmp_path, SUFFIXES)
    assert notes[0].count(",") < 40
    assert notes[0].count("…") == 2


@pytest.mark.parametrize("name", ["a.txt", "My Book (2).txt", "a~b.txt", "#1 hits.txt", "日本.txt"])
def test_ordinary_names_are_not_ignored(name: str) -> None:
    assert not is_ignored(name)


@settings(max_examples=50)
@example(names=set(), pattern=["a", "**"])
@given(
    names=st.sets(st.text("ab.[*", min_size=1, max_size=3).filter(lambda n: n not in (".", ".."))),
    pattern=st.lists(
        st.sampled_from(["**", "*", "a*", ".*", "?", "[ab]", "a", "b", "*.a", "[[]"]),
        min_size=1,
        max_size=3,
    ),
)
def test_patterns_match_like_glob(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], pattern: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    for name in names:
        (folder / "b" / name / "a").mkdir(parents=True)
        (folder / "b" / name / f"{name}.a").touch()
        (folder / f"{name}.a").touch()
    full_pattern = Path(folder, *pattern)
    assume("**/**" not in str(full_pattern))  # glob returns some of its paths twice
    expected = {Path(match) for match in glob.glob(str(full_pattern), recursive=True)}
    expected = {path for path in expected if path.exists()}  # glob matches a missing "a"
    assert expand_pattern(full_pattern) == sorted(expected)
