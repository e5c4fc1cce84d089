"""The machine report, with fake commands and once in full."""

from __future__ import annotations

import json
import pwd
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine_report
import pytest
from machine_report import PartResult, Workspace

from mlxgpt.backend import macos
from mlxgpt.bench.records import Machine
from mlxgpt.utils.errors import UserError

Capture = pytest.CaptureFixture[str]
MAC = Machine(
    chip="Apple M1 Pro",
    backend="metal",
    cores=10,
    performance_cores=8,
    memory=17_179_869_184,
    system="macOS-14.5-arm64-arm-64bit",
    blas="MLX's own",
    versions={"mlxgpt": "0.1.0", "mlx": "0.32.4"},
    commit="0123456789ab",
    load=1.234,
    bandwidth=180e9,
)


@pytest.fixture
def set_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the report's parts."""

    def replace(**parts: Callable[[Workspace], PartResult]) -> None:
        monkeypatch.setattr(machine_report, "REPORT_PARTS", parts)

    return replace


@pytest.fixture(autouse=True)
def restore_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def pass_part(workspace: Workspace) -> PartResult:
    return True, "well", ["It is well."]


def fail_part(workspace: Workspace) -> PartResult:
    raise UserError(f"no {Path.home()}/x on {socket.gethostname()}", "a remedy")


def test_failing_part_does_not_affect_other_parts(
    tmp_path: Path, set_parts: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Tower-of-Jane.fritz.box")
    monkeypatch.setenv("HOME", "/Users/janedoe")
    account = SimpleNamespace(pw_name="janedoe", pw_dir="/Users/janedoe")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)

    def crash(workspace: Workspace) -> PartResult:
        raise ValueError(f"first\n{tempfile.gettempdir()}/of-janedoe/{machine_report.ROOT}")

    set_parts(first=pass_part, second=fail_part, third=crash, fourth=pass_part)
    assert machine_report.main(["--output", str(tmp_path / "new")]) == 1
    (path,) = (tmp_path / "new").iterdir()
    text = path.read_text()
    assert "- first: passed: well\n" in text
    assert "- second: **failed**: no HOME/x on HOST\n" in text
    assert "- third: **failed**: ValueError: TEMP/of-USER/CHECKOUT\n" in text
    assert "- fourth: passed: well\n" in text
    assert text.count("It is well.") == 2
    assert "jane" not in text.lower()


def test_each_part_is_written_when_it_is_done(
    tmp_path: Path, set_parts: Callable[..., None]
) -> None:
    reports: list[str] = []

    def read_report(workspace: Workspace) -> PartResult:
        (path,) = tmp_path.iterdir()
        reports.append(path.read_text())
        return True, "looked", []

    set_parts(first=pass_part, second=read_report, third=pass_part)
    assert machine_report.main(["--output", str(tmp_path)]) == 0
    assert "It is well." in reports[0]
    assert "second" not in reports[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signals_keep_the_finished_parts(
    tmp_path: Path, number: signal.Signals, set_parts: Callable[..., None], capsys: Capture
) -> None:
    def stop(workspace: Workspace) -> PartResult:
        signal.raise_signal(number)
        return pass_part(workspace)

    set_parts(first=pass_part, second=stop, third=lambda workspace: pytest.fail("it continued"))
    assert machine_report.main(["--output", str(tmp_path)]) == 130
    (path,) = tmp_path.iterdir()
    assert "- first: passed: well\n- second: **failed**: stopped\n" in path.read_text()
    assert f"written to {path}" in capsys.readouterr().err


def test_report_is_named_after_the_chip_and_overwrites_no_other(
    tmp_path: Path, set_parts: Callable[..., None]
) -> None:
    def describe(workspace: Workspace) -> PartResult:
        workspace.machine = MAC
        return pass_part(workspace)

    set_parts(first=pass_part, second=describe, third=pass_part)  # the chip is unknown at first
    for _ in range(2):
        assert machine_report.main(["--output", str(tmp_path), "--skip", "third"]) == 0
    names = sorted(path.name[len("2026-11-22-") :] for path in tmp_path.iterdir())
    assert names == ["m1-pro-machine-2.md", "m1-pro-machine.md"]
    assert "second" in (next(tmp_path.iterdir())).read_text()
    assert "third" not in (next(tmp_path.iterdir())).read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--source", "missing.txt"], "cannot use missing.txt: No such file"),
        (["--source", "."], "cannot use .: Is a directory"),
        (["--output", "a-file"], "cannot use a-file: File exists"),
    ],
)
def test_invalid_arguments_are_refused_before_starting(
    home: Path, arguments: list[str], problem: str, set_parts: Callable[..., None], capsys: Capture
) -> None:
    set_parts(first=lambda workspace: pytest.fail("it started"))
    (home / "a-file").write_text("x")
    assert machine_report.main(["--output", "out", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"report-machine: {problem}")
    assert lines[1].startswith("  → ")
    assert not list(home.glob("**/*.md"))


def test_intel_mac_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse() -> None:
        raise UserError("this Mac has an Intel processor", "use another.")

    monkeypatch.setattr(macos, "check_apple_silicon", refuse)
    assert machine_report.main(["--output", str(tmp_path / "out")]) == 2
    assert "Intel processor\n  → use another." in capsys.readouterr().err


def test_sigint_works_in_background_jobs(set_parts: Callable[..., None], tmp_path: Path) -> None:
    """Shells ignore SIGINT for background jobs, and child processes inherit that."""
    set_parts(first=pass_part)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    machine_report.main(["--output", str(tmp_path)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failing_command_is_reported_by_its_last_line(tmp_path: Path) -> None:
    code = "import sys; print('x'); sys.exit('mlxgpt: no memory\\n  → buy some')"
    with pytest.raises(RuntimeError, match="exit code 1: mlxgpt: no memory"):
        Workspace(tmp_path).run(sys.executable, "-c", code)
    assert Workspace(tmp_path).run(sys.executable, "-c", "print('x')") == "x\n"


def test_timeout_ends_all_processes_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the command nor its child processes."""
    alive_file = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(alive_file)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    monkeypatch.setattr(machine_report, "COMMAND_TIMEOUT", 0.5)
    with pytest.raises(RuntimeError, match="no result after"):
        Workspace(tmp_path).run(sys.executable, "-c", code + "time.sleep(60)")
    time.sleep(2.5)
    assert not alive_file.exists()


SUITE = """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_bad(n):
    assert n == 2, "one is not two"

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_error(broken):
    pass
"""


def test_failed_tests_are_listed(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ("-rfE", "--tb=no", "-p", "no:xdist", str(tmp_path))
    passed, line, body = machine_report.run_tests(Workspace(tmp_path, pytest_args=arguments))
    assert not passed
    assert line.startswith("1 failed, 1 passed, 1 error in ")
    assert "test_some.py::test_bad[1] - AssertionError: one is not two" in body[0]
    assert "test_some.py::test_error - OSError: no fixture" in body[1]
    passed, line, body = machine_report.run_tests(
        Workspace(tmp_path, pytest_args=(*arguments, "-k", "2"))
    )
    assert (passed, body) == (True, [])
    with pytest.raises(RuntimeError, match="exit code 4"):
        machine_report.run_tests(Workspace(tmp_path, pytest_args=("--no-such-flag",)))


class FakeWorkspace(Workspace):
    """A workspace whose commands return prepared answers."""

    answers: Any = None

    def run(self, *command: str, exit_codes: Sequence[int] = (0,), **environment: str) -> str:
        self.asked = [*getattr(self, "asked", []), (command, environment)]
        return json.dumps(self.answers.pop(0))


def workspace_with_answers(
    home: Path, *answers: Any, machine: Machine | None = None
) -> FakeWorkspace:
    workspace = FakeWorkspace(home, machine=machine)
    workspace.answers = list(answers)
    return workspace


def test_failed_check_is_named(tmp_path: Path) -> None:
    checks = [{"name": f"check {n}", "ok": n != 1, "detail": "a | b"} for n in range(3)]
    passed, line, body = machine_report.self_check(workspace_with_answers(tmp_path, checks))
    assert (passed, line) == (False, "failed: check 1")
    assert "a \\| b" in body[-1]
    passed, line, _ = machine_report.self_check(workspace_with_answers(tmp_path, checks[:1]))
    assert (passed, line) == (True, "1 checks")


def test_tier_part_includes_its_bench_report(tmp_path: Path) -> None:
    (tmp_path / "bench.md").write_text("# tier1\n\n## Measured\n\nfast\n")
    speeds = {
        "training": {"tokens_per_second": 1234.5},
        "generation": {"tokens_per_second": {"median": 99.0}},
    }
    answer = {
        "tiers": [speeds],
        "reports": ["", str(tmp_path / "bench.md")],
        "machine": asdict(MAC),
    }
    workspace = workspace_with_answers(tmp_path, answer)
    passed, line, body = machine_report.measure_tier(workspace, 1)
    assert (passed, line) == (True, "1,230 tokens/s in training, 99.0 in generation")
    assert body == ["### tier1", "", "#### Measured", "", "fast"]
    assert workspace.machine == MAC


@pytest.mark.parametrize(
    ("backend", "resumed", "digests", "passed"),
    [
        ("cpu", True, "aa", True),
        ("metal", True, "aa", True),
        ("cpu", False, "aa", False),
        ("cpu", True, "abaa", False),
        ("cpu", True, "abac", False),  # CPU runs are bit-exact
        ("metal", True, "abaa", False),
        ("metal", True, "abac", True),  # two uninterrupted runs differ too
    ],
)
def test_criteria_for_a_resumed_run(
    tmp_path: Path,
    backend: str,
    resumed: bool,
    digests: str,
    passed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = {"resumed": resumed, "step": 300}
    machine = Machine(**{**asdict(MAC), "backend": backend})
    workspace = workspace_with_answers(tmp_path, answer, answer, machine=machine)
    hashes = iter(digests)
    monkeypatch.setattr(machine_report, "kill_after_step", lambda workspace, line, step: step + 1)
    monkeypatch.setattr(
        Workspace, "list_checkpoints", lambda workspace, name: [Path("step-50"), Path("step-100")]
    )
    monkeypatch.setattr(Workspace, "checkpoint_digest", lambda workspace, name: next(hashes))
    outcome = machine_report.kill_and_resume(workspace)
    assert outcome[0] is passed
    assert outcome[1].startswith("killed after step 181, resumed from step-100 to 300: ")


SMALL = "--tier 1 --n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2 --sample-tokens 4"


def test_run_that_ends_before_it_is_killed_is_an_error(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path / "missing.txt", SMALL.split())
    with pytest.raises(RuntimeError, match=r"ended before it was killed: mlxgpt: .*missing\.txt"):
        machine_report.kill_after_step(workspace, workspace.train_command("killed"), 5)


@pytest.mark.slow
def test_full_report(tmp_path: Path, text: str) -> None:
    source, out = tmp_path / "diary.txt", tmp_path / "out"
    source.write_text(20 * text, encoding="utf-8")
    (tmp_path / "home").mkdir()
    tests = ("tests/utils/test_seeds.py", "-n", "0", "-rfE")
    workspace = Workspace(tmp_path / "home", train_args=SMALL.split(), pytest_args=tests)
    assert (
        machine_report.main(
            ["--source", str(source), "--output", str(out), "--skip", "tier2"], workspace
        )
        == 0
    )
    (path,) = out.iterdir()
    page = path.read_text(encoding="utf-8")
    assert page.count(": passed: ") == 5
    assert "the same bits as the uninterrupted run" in page
    assert "diary" not in page
