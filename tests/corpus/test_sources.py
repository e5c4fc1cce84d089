from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxgpt.corpus import sources
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
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        sources.open_source([str(path)])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file, folder or corpus 'shakespear'"):
        sources.open_source(["shakespear"])
    with pytest.raises(UserError, match=r"no \.txt file"):
        sources.open_source([str(tmp_path)])


class FakeHub:
    """`datasets.load_dataset` over texts at hand, or an error."""

    def __init__(self, train: str, val: str, test: str) -> None:
        self.splits = {"train": [train], "validation+test": [val, test]}
        self.asked: list[tuple[str, str]] = []

    def load_dataset(self, path: str, *, split: str) -> dict[str, list[str]]:
        self.asked.append((path, split))
        return {"text": self.splits[split]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import datasets

    fake = FakeHub("abc" * 30, "de", "fg")
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    digest = hashlib.sha256(("abc" * 30 + "defg").encode()).hexdigest()
    pinned = replace(sources.HUB["shakespeare"], sha256=digest)
    monkeypatch.setitem(sources.HUB, "shakespeare", pinned)
    return fake


def test_the_hubs_splits_become_nanogpts(hub: FakeHub) -> None:
    source = sources.open_source(["shakespeare"])
    assert (list(source.train), list(source.val)) == (["abc" * 30], ["defg"])
    assert source.single
    assert source.origin == sources.hub_origin("shakespeare")
    assert {path for path, _ in hub.asked} == {"karpathy/tiny_shakespeare"}


def test_another_text_under_the_same_name_is_refused(hub: FakeHub) -> None:
    hub.splits["train"] = ["abd" * 30]
    with pytest.raises(UserError, match="is not the text it was"):
        sources.open_source(["shakespeare"])


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        sources.open_source(["shakespeare"])
    assert "ConnectionError" in caught.value.problem
    assert "--source" in caught.value.remedy


def test_datasets_itself_reads_a_parquet_as_the_hub_holds_it(tmp_path: Path) -> None:
    """The real library, on a file of the hub's form: a row a split, column `text`."""
    import datasets

    file = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"text": ["First Citizen:\n"]}).to_parquet(file)
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": str(file)}, split="train", cache_dir=str(tmp_path)
    )
    assert list(loaded["text"]) == ["First Citizen:\n"]


def test_real_shakespeare_is_the_pinned_text(shakespeare: Path) -> None:
    _, digest = sources.read_documents([str(shakespeare)])
    assert digest == sources.HUB["shakespeare"].sha256
    source = sources.open_source([str(shakespeare)])
    assert [len(d) for d in (*source.train, *source.val)] == [1_003_854, 111_540]
