from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mlxgpt.corpus import sources
from mlxgpt.corpus.hub import HUB
from mlxgpt.errors import UserError


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_single_document_is_cut_at_nine_tenths(tmp_path: Path) -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000)) + "\n"
    source = sources.open_source([write(tmp_path / "a b.txt", text)])
    assert source.single
    assert source.name == "a-b"
    assert list(source.train) == [text[:900]]
    assert list(source.val) == [text[900:]]
    assert source.origin["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_many_documents_are_split_by_content(tmp_path: Path) -> None:
    stories = [f"Story number {n} of many." for n in range(2000)]
    text = "\n<|endoftext|>\n".join(stories + stories[:500])  # the first 500 come twice
    source = sources.open_source([write(tmp_path / "s.txt", text)])
    train, val = list(source.train), list(source.val)
    assert not source.single
    assert set(train) | set(val) == set(stories), "newlines around stories are stripped"
    assert not set(train) & set(val), "duplicates stay on one side"
    assert len(train) + len(val) == 2500
    assert 5 <= len(set(val)) <= 45, "about one in a hundred"
    backwards = write(tmp_path / "r.txt", "<|endoftext|>".join(reversed(stories)))
    assert set(sources.open_source([backwards]).val) == set(val), "whatever their order"


def test_two_documents_give_one_for_each_side(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.txt", f"text {n}\n") for n in (1, 2)]
    source = sources.open_source(paths)
    assert len(list(source.train)) == len(list(source.val)) == 1
    assert not source.single


def test_a_folder_is_all_its_text_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "f" / "b.txt", "second")
    write(tmp_path / "f" / "a.txt", "first")
    write(tmp_path / "f" / "deeper" / "c.txt", "third")
    write(tmp_path / "f" / "not.md", "no")
    assert sources.read_documents([str(tmp_path / "f")])[0] == ["first", "second", "third"]


def test_given_validation_text_is_dropped_from_the_training_side(tmp_path: Path) -> None:
    train = write(tmp_path / "t.txt", "one<|endoftext|>two<|endoftext|>three")
    val = write(tmp_path / "v.txt", "two\n")
    source = sources.open_source([train], [val])
    assert (list(source.train), list(source.val)) == (["one", "three"], ["two"])
    with pytest.raises(UserError, match="every training document"):
        sources.open_source([val], [val])


def test_two_single_documents_have_no_end_of_text(tmp_path: Path) -> None:
    train, val = write(tmp_path / "t.txt", "one\n"), write(tmp_path / "v.txt", "two\n")
    source = sources.open_source([train], [val])
    assert source.single
    assert (list(source.train), list(source.val)) == (["one\n"], ["two\n"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no text"),
        (b" \n<|endoftext|>\n", "no text"),
        ("Stra\u00dfe".encode("latin-1"), r"not UTF-8 text \(byte 4\)"),
        (b"to be\0or not", "no text: byte 5 is NUL"),
        ("to be".encode("utf-16"), "no text: byte 3 is NUL"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        sources.open_source([str(path)])


def test_a_pattern_that_no_shell_has_expanded(home: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        write(home / "texts" / name, name)
    write(home / "odd[1].txt", "odd")
    assert sources.read_documents(["texts/*.txt"])[0] == ["a.txt", "b.txt"]
    assert sources.read_documents(["odd[1].txt"])[0] == ["odd"], "a file of that very name"
    with pytest.raises(UserError, match=r"no file matches 'texts/\*.rst'"):
        sources.read_documents(["texts/*.rst"])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file, folder or corpus 'shakespear'"):
        sources.open_source(["shakespear"])
    with pytest.raises(UserError, match=r"no \.txt file"):
        sources.open_source([str(tmp_path)])


def test_the_storybook_is_a_source_of_the_length_that_was_asked_for() -> None:
    source = sources.open_source(["storybook"], megabytes=0.2)
    train, val = list(source.train), list(source.val)
    assert sum(map(len, train)) == pytest.approx(200_000, abs=1000)
    assert sum(map(len, val)) == pytest.approx(2_000, abs=1000)
    assert not set(train) & set(val)
    assert list(source.train) == train, "it can be read again"
    assert not source.single


@pytest.mark.parametrize("megabytes", [0.0, -1.0, float("nan"), 1e9])
def test_lengths_that_cannot_be_are_refused(megabytes: float) -> None:
    with pytest.raises(UserError, match="is no length for the storybook"):
        sources.open_source(["storybook"], megabytes=megabytes)


def test_what_a_corpus_cannot_have_is_refused() -> None:
    with pytest.raises(UserError, match="has its own validation text"):
        sources.open_source(["storybook"], ["val.txt"])
    with pytest.raises(UserError, match="only the storybook"):
        sources.open_source(["shakespeare"], megabytes=1)


def test_a_file_named_like_a_corpus_comes_first(home: Path) -> None:
    (home / "storybook").write_text("0123456789")
    assert list(sources.open_source(["storybook"]).train) == ["012345678"]


def test_real_shakespeare_is_the_pinned_text(shakespeare: Path) -> None:
    _, digest = sources.read_documents([str(shakespeare)])
    assert digest == HUB["shakespeare"].sha256
    source = sources.open_source([str(shakespeare)])
    assert [len(d) for d in (*source.train, *source.val)] == [1_003_854, 111_540]
