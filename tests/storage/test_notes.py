from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlxgpt import files
from mlxgpt.storage.notes import Notes


@pytest.fixture
def notes(trained: Path, tmp_path: Path) -> Notes:
    """A finished run's, to be changed."""
    return Notes(Path(shutil.copytree(trained / "runs" / "done", tmp_path / "done")))


def test_metrics_are_cut_back(notes: Notes) -> None:
    with (notes.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # as a crash leaves it
    assert [record["step"] for record in notes.metrics()] == [2, 4, 6, 8, 10, 12]
    assert notes.cut(8)
    assert [record["step"] for record in notes.metrics()] == [2, 4, 6, 8]
    notes.log({"step": 10})
    assert list(notes.metrics())[-1] == {"step": 10}


def test_the_disk_holds_what_was_noted_and_its_names(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    notes.sync_notes()
    assert synced == ["metrics.jsonl", "samples.txt", "history.jsonl", "done"]


def test_samples_come_back_as_they_were_written(notes: Notes) -> None:
    assert [step for step, _ in notes.samples(100)] == [4, 8, 12]
    (notes.folder / "samples.txt").unlink()
    assert list(notes.samples(100)) == []
    notes.add_sample(5, "To be\n\nor --- step 3\nnot")
    notes.add_sample(10, "x" * 1000)
    notes.add_sample(15, "")
    found = list(notes.samples(100))
    assert found == [(5, "To be\n\nor --- step 3\nnot"), (10, "x" * 100), (15, "")]


def test_where_it_went_back_does_not_hide_what_it_ran_on(notes: Notes) -> None:
    notes.add_to_history(0, {"mlx": "1"}, {}, {"seconds": 2.0})
    notes.add_return(40, 63)
    assert notes.surroundings() == {"mlx": "1"}
    *_, first, last = notes.history()
    assert first["forecast"] == {"seconds": 2.0}
    assert (last["step"], last["spiked"]) == (40, 63)
