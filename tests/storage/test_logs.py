from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mlxgpt.storage.logs import RunLogs
from mlxgpt.utils import files
from tests.helpers.failing_files import ERRNOS, failing_open


@pytest.fixture
def logs(trained: Path, tmp_path: Path) -> RunLogs:
    """Logs of a copy of the finished run, for modification."""
    return RunLogs(Path(shutil.copytree(trained / "runs" / "done", tmp_path / "done")))


def test_truncate_after_removes_later_metrics(logs: RunLogs) -> None:
    with (logs.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # as after a crash
    assert [record["step"] for record in logs.metrics()] == [2, 4, 6, 8, 10, 12]
    assert logs.truncate_after(8)
    assert [record["step"] for record in logs.metrics()] == [2, 4, 6, 8]
    logs.log({"step": 10})
    assert list(logs.metrics())[-1] == {"step": 10}


def test_sync_logs_syncs_all_files_and_the_folder(
    logs: RunLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced_files: list[str] = []
    monkeypatch.setattr(files, "fsync_path", lambda path: synced_files.append(path.name))
    logs.sync_logs()
    assert synced_files == ["metrics.jsonl", "samples.txt", "history.jsonl", "done"]


def test_samples_are_read_as_written(logs: RunLogs) -> None:
    assert [step for step, _ in logs.samples(100)] == [4, 8, 12]
    (logs.folder / "samples.txt").unlink()
    assert list(logs.samples(100)) == []
    logs.add_sample(5, "To be\n\nor --- step 3\nnot")
    logs.add_sample(10, "x" * 1000)
    logs.add_sample(15, "")
    samples = list(logs.samples(100))
    assert samples == [(5, "To be\n\nor --- step 3\nnot"), (10, "x" * 100), (15, "")]


def test_an_incomplete_sample_is_removed(tmp_path: Path) -> None:
    logs, path = RunLogs(tmp_path), tmp_path / "samples.txt"
    logs.add_sample(2, "To be\n\nor")
    intact = path.read_bytes()
    logs.add_sample(14, "not\n\nto be\n")
    torn = path.read_bytes()
    logs.log({"step": 2})
    for size in range(len(intact), len(torn)):
        path.write_bytes(torn[:size])
        logs.truncate_after(2)
        assert path.read_bytes() == intact, torn[:size]


def test_last_environment_after_a_rollback(logs: RunLogs) -> None:
    logs.log_session_start(0, {"mlx": "1"}, {}, {"seconds": 2.0})
    logs.log_rollback(40, 63)
    assert logs.last_environment() == {"mlx": "1"}
    *_, first, last = logs.history()
    assert first["forecast"] == {"seconds": 2.0}
    assert (last["step"], last["spiked"]) == (40, 63)


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize(("name", "after"), [("metrics.jsonl", 0), ("samples.txt", 0)])
def test_unreadable_logs_are_not_treated_as_empty(
    logs: RunLogs, monkeypatch: pytest.MonkeyPatch, name: str, after: int, number: int
) -> None:
    """Otherwise `truncate_after` would overwrite them with nothing."""
    before = {path: path.read_bytes() for path in logs.folder.iterdir() if path.is_file()}
    with monkeypatch.context() as patch:
        failing_open(patch, name, number, after=after)
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '.*{name}'"):
            logs.truncate_after(8)
        with pytest.raises(OSError, match=name):
            list(logs.metrics() if name == "metrics.jsonl" else logs.samples(10))
    assert {path: path.read_bytes() for path in logs.folder.iterdir() if path.is_file()} == before
    assert logs.truncate_after(8)


def test_a_failed_read_reports_the_file(logs: RunLogs) -> None:
    (logs.folder / "history.jsonl").unlink()
    (logs.folder / "history.jsonl").mkdir()
    with pytest.raises(IsADirectoryError, match=r"history\.jsonl"):
        list(logs.history())


def test_an_incomplete_line_does_not_damage_the_next(logs: RunLogs) -> None:
    """As after a full disk."""
    for name in ("history.jsonl", "metrics.jsonl", "samples.txt"):
        with (logs.folder / name).open("a", encoding="utf-8") as file:
            file.write("--- step 1")
    logs.log_rollback(40, 63)
    logs.log({"step": 99})
    logs.add_sample(99, "to be")
    assert list(logs.history())[-1]["spiked"] == 63
    assert list(logs.metrics())[-1] == {"step": 99}
    assert list(logs.samples(100))[-1] == (99, "to be")
    logs.log({"step": 100})
    assert [record["step"] for record in logs.metrics()][-2:] == [99, 100]
    lines = (logs.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-2]) == {"step": 99}, "no empty lines between"
