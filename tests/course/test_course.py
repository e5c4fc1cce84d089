"""The text of the course, and the check of its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import course
import pytest

from mlxgpt.data.hub import DatasetUnavailableError
from mlxgpt.data.readers import DocumentPiece
from mlxgpt.data.sources import Source, open_source


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLXGPT_TEXTS", raising=False)
    monkeypatch.setattr(course, "_is_shakespeare", None)


def test_without_a_network_the_text_has_all_characters_that_chapters_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_offline(source: list[str], **settings: Any) -> Source:
        if source == ["shakespeare"]:
            raise DatasetUnavailableError("it could not be downloaded", "connect")
        return open_source(source, **settings)

    monkeypatch.setattr(course, "open_source", open_offline)
    text = course.load_text()
    assert len(text) == course.SHAKESPEARE_LENGTH
    assert set("ROMEO:\nI the q") <= set(text[:100_000])
    assert "could not be downloaded" in capsys.readouterr().out
    course.expect(1.0, 2.0, 0.1)  # figures are those of Tiny Shakespeare


def test_both_splits_of_the_hub_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "x" * (course.SHAKESPEARE_LENGTH - 5) + "house"
    train = [DocumentPiece(whole[:1000], last=False), DocumentPiece(whole[1000:-5])]
    source = Source("shakespeare", {}, train, [DocumentPiece("house")], len(whole), single=True)
    monkeypatch.setattr(course, "open_source", lambda source_names: source)
    assert course.load_text() == whole
    with pytest.raises(AssertionError, match="is not 2"):
        course.expect(1.0, 2.0, 0.1)


def test_a_folder_of_texts_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "input.txt").write_text("To be")
    monkeypatch.setenv("MLXGPT_TEXTS", str(tmp_path))
    assert course.load_text() == "To be"


def test_a_figure_before_the_text_is_an_error() -> None:
    with pytest.raises(AssertionError, match="load_text first"):
        course.expect(1.0, 1.0, 0.1)
