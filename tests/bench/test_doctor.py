"""`mlxgpt doctor`, with its real child processes."""

from __future__ import annotations

import json
import pwd
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxgpt.bench import doctor
from mlxgpt.bench.doctor import Finding, run_part
from mlxgpt.cli.main import main
from mlxgpt.storage.logs import RunLogs
from mlxgpt.utils import json_files
from tests.helpers.commands import Capture

RUN_NAME = "my-secret-run"


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> RunLogs:
    """The newest run, of a user and on a host whose names can be recognized."""
    account = SimpleNamespace(pw_name="janedoe", pw_dir="/Users/janedoe")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)
    monkeypatch.setattr(socket, "gethostname", lambda: "tower-of-jane")
    monkeypatch.setenv("MLXGPT_HOME", str(place))
    return RunLogs((place / "runs/done").rename(place / "runs" / RUN_NAME))


def details(part: str) -> dict[str, str]:
    return {finding.name: finding.detail for finding in run_part(part)}


def print_in_part(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Make each part run this code."""
    monkeypatch.setattr(doctor, "CHILD_CODE", f"import json, os, time\n{code}")


def finding_code(detail: str) -> str:
    line = json.dumps({"name": "x", "ok": None, "detail": detail})
    return f"print({line!r}, flush=True)\n"


def test_report_is_one_fenced_block_without_anything_private(
    run: RunLogs, place: Path, capsys: Capture
) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert (lines[0], lines[-1], text.count("```")) == ("```text", "```", 2)
    assert [line for line in lines if line in doctor.PARTS] == list(doctor.PARTS)
    assert "  saved step            12 of 12, finished" in lines
    assert text.count(" ok: ") == 11
    for private in (RUN_NAME, "words", "to be", "in Spain", "jane", str(place), str(Path.home())):
        assert private not in text, private
    assert "/" not in text.replace("GB/s", "").replace("runs/", "").replace("data/", "")


def test_json_output(run: RunLogs, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    print_in_part(monkeypatch, finding_code("a"))
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {part: [{"name": "x", "ok": None, "detail": "a"}] for part in doctor.PARTS}


def test_software_lists_versions() -> None:
    import numpy

    software = details("software")
    assert software["numpy"] == numpy.__version__
    assert {"mlxgpt", "Python", "mlx", "datasets", "tokenizers", "system"} <= software.keys()


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ("cannot read /Volumes/Secret/words.txt: it is", "cannot read PATH: it is"),
        ("in '../secret/a', ~/secret or HOME", "in 'PATH', PATH or HOME"),
        ("janedoe's file on Tower-of-Jane", "USER's file on HOST"),
        (
            "17 GB/s, 1/2, runs/, https://example.org/x",
            "17 GB/s, 1/2, runs/, https://example.org/x",
        ),
        ("a\x1b[31m\nb", "a [31m b"),
    ],
)
def test_private_names_and_paths_are_replaced(
    run: RunLogs, detail: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    print_in_part(monkeypatch, finding_code(detail))
    assert details("software") == {"x": expected}


def test_folders_with_a_space_are_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "of my employer"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for private in (folder, Path.home()):
        print_in_part(monkeypatch, finding_code(f"{private}/x"))
        assert details("software") == {"x": "PATH"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("os.write(2, b'why\\nlast'); os.abort()", "the process ended with SIGABRT: last"),
        ("raise SystemExit('a reason')", "the process ended with code 1: a reason"),
        ("time.sleep(60)", "no result after 2 s"),
    ],
)
def test_crash_of_a_part_keeps_its_earlier_findings(
    code: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(doctor, "PART_TIMEOUT", 2.0)
    print_in_part(monkeypatch, f"print('noise')\n{finding_code('a')}{code}")
    expected = [Finding("x", None, "a"), Finding("error", False, error)]
    assert run_part("software") == expected
    monkeypatch.setattr(doctor, "PARTS", {"software": doctor.PARTS["software"]})
    assert main(["doctor"]) == 1
    assert f"\n  error  FAILED: {error}\n```" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ImportError('no Metal device')", "ImportError: no Metal device"),
        ("import os; os.abort()", "the process ended with SIGABRT"),
    ],
)
def test_other_parts_work_without_mlx(
    run: RunLogs, place: Path, code: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "broken/mlx").mkdir(parents=True)
    (place / "broken/mlx/__init__.py").touch()
    (place / "broken/mlx/core.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(place / "broken"))
    for part in ("device", "self-check", "newest run"):
        (finding,) = run_part(part)
        assert (finding.name, finding.ok) == ("error", False)
        assert finding.detail.startswith(error)
    assert all(f.ok is not False for f in run_part("software"))
    assert {"free disk at runs/", "free disk at data/"} <= details("memory limits and disk").keys()


def test_module_in_the_current_folder_is_not_imported(place: Path) -> None:
    (place / "platform.py").write_text("raise SystemExit")
    assert "mlx" in details("software")


def test_no_runs(home: Path) -> None:
    assert run_part("newest run") == [Finding("newest run", None, "there is no run in runs/")]


@pytest.mark.parametrize("name", ["run.json", "config.toml", "tokenizer.json", "best.json"])
def test_logs_of_a_damaged_run_are_shown(run: RunLogs, name: str) -> None:
    for file in ("metrics.jsonl", "best.json") if name == "best.json" else (name,):
        (run.folder / file).write_text('{"a": "private text"')
    findings = run_part("newest run")
    (error,) = [finding for finding in findings if finding.ok is False]
    assert error.name == "error"
    assert f"RUN/{name}" in error.detail
    assert any(finding.name == "event" for finding in findings)
    assert RUN_NAME not in str(findings)
    assert "private" not in str(findings)


def test_quoted_content_of_a_damaged_run_is_left_out(run: RunLogs) -> None:
    path = run.folder / "run.json"
    metadata = {**json.loads(path.read_text()), "data_name": "a/private"}
    del metadata[json_files.CHECKSUM_KEY]
    path.write_text(json_files.dump_checksummed(metadata))
    (error,) = [finding for finding in run_part("newest run") if finding.ok is False]
    assert error.detail == "RUN/run.json is damaged: '…' is not a valid data folder name"


def test_unreadable_runs_folder(home: Path) -> None:
    (home / "runs").symlink_to("runs")
    assert run_part("newest run") == [
        Finding("error", False, "OSError: Too many levels of symbolic links")
    ]


def test_history_and_metrics_show_names_and_numbers_only(run: RunLogs) -> None:
    for name in ("history.jsonl", "metrics.jsonl"):
        (run.folder / name).unlink()
    changed = {"source": (["my.txt"], ["other.txt"]), "batch_size": (4, 8), "private": (1, 2)}
    run.log_session_start(0, {"mlx": "1", "ranks": "1"}, {}, {})
    run.log_session_start(7, {"mlx": "2", "ranks": "1"}, changed, {})
    run.log_session_start(7, {"mlx": "2", "ranks": "1"}, {}, {})
    run.log_rollback(8, 9)
    for step in range(1, 9):
        run.log({"step": step, "loss": None if step == 8 else step / 3, "note": "private"})
    findings = run_part("newest run")
    events = [f.detail.split(": ", 1)[1] for f in findings if f.name == "event"]
    assert events == [
        "mlx 1, ranks 1",
        "resumed; mlx 1 → 2, source changed, batch_size changed",
        "resumed; same environment",
        "rolled back after a loss spike at step 9",
    ]
    records = [(f.name, f.detail.split(",")[0]) for f in findings if f.name.startswith("step ")]
    assert [name for name, _ in records] == [f"step {n}" for n in (1, 4, 5, 6, 7, 8)]
    assert records[0][1] == "loss 0.333333"
    assert records[-1][1] == "loss not finite"
    assert "private" not in str(findings)
    assert "txt" not in str(findings)
