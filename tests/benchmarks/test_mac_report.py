from __future__ import annotations

import re
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mac_report
import mac_report_lab as lab_of
import pytest
from mac_report_lab import Apart, Lab, Plan
from mac_report_power import Power

from mlxgpt.config import Config
from mlxgpt.errors import UserError
from mlxgpt.machine import device, mac
from mlxgpt.reports import bench
from mlxgpt.reports.records import Machine
from mlxgpt.storage import notes
from tests.benchmarks.made_up import MAC, checks, new_lab
from tests.reports.measured import cells

Capture = pytest.CaptureFixture[str]


def failing(*_: Any) -> mac_report.Outcome:
    """A part that fails, and tells all it knows."""
    home, temp = Path.home(), tempfile.gettempdir()
    secrets = f"{home}/Diary/may.txt, {lab_of.ROOT}/x.py, {temp}/pytest-of-janedoe/y"
    raise UserError(f"{secrets}, /Volumes/Jane/z of Jane Q. Doe at Tower-of-Jane.fritz.box", "no")


@pytest.fixture
def parts_are_made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def replaced(**others: Callable[..., Any]) -> None:
        for name in (
            "the_machine",
            "self_check",
            "tests",
            "speed",
            "training",
            "killed_and_resumed",
            "generation",
        ):
            part = others.get(name, lambda *_: (True, "well", ["It is well."]))
            monkeypatch.setattr(mac_report, name, part)

    return replaced


def test_a_report_tells_nothing_private(
    jane: Path, tmp_path: Path, parts_are_made_up: Callable[..., None], capsys: Capture
) -> None:
    def crash(*_: Any) -> mac_report.Outcome:
        raise ValueError(f"first\n{jane}/secret by janedoe")

    parts_are_made_up(tests=failing, generation=crash)
    assert mac_report.main(["--out", str(tmp_path / "out")]) == 1
    (path,) = (tmp_path / "out").iterdir()
    text = path.read_text()
    for secret in ("jane", "tower", "fritz", str(lab_of.ROOT), "/Volumes", tempfile.gettempdir()):
        assert secret.lower() not in text.lower(), secret
    assert "- the tests: failed: HOME/Diary/may.txt, CHECKOUT/x.py, TEMP/pytest-of-USER/y" in text
    assert "- generation: failed: ValueError: HOME/secret by USER" in text
    assert "- killed and resumed: passed: well" in text, "the rest goes on"
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"written to {path}"
    assert shown[1].startswith("passed: the machine, the self-check, speed of tier1, speed of")
    assert shown[2] == "failed: the tests, generation"


def test_a_report_is_never_written_over_another(
    tmp_path: Path, parts_are_made_up: Callable[..., None], capsys: Capture
) -> None:
    parts_are_made_up()
    for _ in range(3):
        assert mac_report.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("failed: nothing") == 3
    names = sorted(path.stem.rpartition("mac-report")[2] for path in tmp_path.iterdir())
    assert names == ["", "-2", "-3"]


def test_a_machine_that_cannot_be_described(
    tmp_path: Path, parts_are_made_up: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_machine() -> Machine:
        raise OSError("no machine")

    real = mac_report.the_machine
    parts_are_made_up()
    monkeypatch.setattr(mac_report, "the_machine", real)
    monkeypatch.setattr(bench, "describe_machine", no_machine)
    assert mac_report.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-chip-mac-report.md")
    assert "- the machine: failed: OSError: no machine" in path.read_text()


def test_a_machine_on_battery_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac_report, "power", lambda: Power("Battery Power", 50, "low power"))
    passed, line, _ = mac_report.the_machine(lambda: MAC)
    assert passed
    assert line.startswith("Apple M1 Pro, 17.2 GB, MLX on metal; on battery, in low power mode")


def test_in_the_background_ctrl_c_can_be_tried_too() -> None:
    """A shell ignores it for what runs there, and whoever is begun from there inherits that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert mac_report.main(["--source", "there-is-none.txt"]) == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--source", "there-is-none.txt"], "cannot read there-is-none.txt: No such file"),
        (["--source", "."], "cannot read .: Is a directory"),
        (["--out", "a-file"], "cannot write in a-file: File exists"),
    ],
)
def test_what_cannot_begin(
    home: Path,
    arguments: list[str],
    problem: str,
    parts_are_made_up: Callable[..., None],
    capsys: Capture,
) -> None:
    parts_are_made_up(the_machine=lambda _: pytest.fail("it has begun"))
    (home / "a-file").write_text("x")
    assert mac_report.main([*arguments, *([] if "--out" in arguments else ["--out", "out"])]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"mac-report: {problem}")
    assert shown.err.splitlines()[1].startswith("  → ")
    assert not shown.out
    assert not list(home.glob("**/*.md"))


def test_it_can_be_stopped(
    tmp_path: Path, parts_are_made_up: Callable[..., None], capsys: Capture
) -> None:
    def stop(*_: Any) -> mac_report.Outcome:
        raise KeyboardInterrupt

    parts_are_made_up(tests=stop)
    assert mac_report.main(["--out", str(tmp_path)]) == 130
    assert "mac-report: stopped, and nothing written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_intel_mac_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse() -> None:
        raise UserError("this Mac has an Intel processor", "use another.")

    monkeypatch.setattr(mac, "refuse_others", refuse)
    assert mac_report.main(["--out", str(tmp_path / "out")]) == 2
    assert "Intel processor\n  → use another." in capsys.readouterr().err


def test_a_text_gets_a_name_that_tells_nothing(tmp_path: Path) -> None:
    source = tmp_path / "my diary.jsonl"
    source.write_text("{}")
    (tmp_path / "home").mkdir()
    copy = mac_report.own_copy(source, tmp_path / "home")
    assert copy == tmp_path / "home" / "text.jsonl"
    assert copy.read_text() == "{}"


SUITE = """
import pytest

def test_good():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_bad(n):
    assert n == 2, "one is not two"

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_error(broken):
    pass

def test_skipped():
    pytest.skip("not here")
"""


def test_tests_are_counted_and_those_that_fail_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    lab = new_lab(tmp_path / "home", tests=(str(tmp_path / "test_some.py"), "-p", "no:xdist"))
    passed, line, body = mac_report.tests(lab)
    assert not passed
    assert line.startswith("2 passed, 2 failed, 1 skipped, in ")
    text = "\n".join(body)
    assert "test_some::test_bad[1]\n        AssertionError: one is not two" in text
    assert "test_some::test_error\n" in text
    assert "OSError: no fixture" in text
    assert "test_good" not in text
    assert socket.gethostname() in (lab.home / "tests.xml").read_text()
    assert socket.gethostname() not in text


def test_tests_that_pass_and_tests_that_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text("def test_good():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    lab = new_lab(tmp_path / "home", tests=(str(tmp_path), "-p", "no:xdist"))
    passed, line, body = mac_report.tests(lab)
    assert passed
    assert line.startswith("1 passed, 0 failed, 0 skipped")
    assert body == []
    lab = new_lab(tmp_path / "other", tests=("--no-such-flag",))
    with pytest.raises(RuntimeError, match=r"\w"):
        mac_report.tests(lab)


@pytest.mark.parametrize(
    ("oks", "passed", "line"),
    [((True, None), True, "2 checks"), ((False, True, False), False, "check 0, check 2")],
)
def test_a_check_that_fails_is_named(oks: Sequence[bool | None], passed: bool, line: str) -> None:
    lab: Any = SimpleNamespace(mlxgpt=lambda *_: (checks(*oks), 0))
    found = mac_report.self_check(lab)
    assert found[:2] == (passed, line)
    assert any("check 0" in row for row in found[2])


SAME, NEAR, FAR = Apart(True, 0.0, 0.0), Apart(False, 1e-7, 0.0), Apart(False, 0.5, 0.1)


@pytest.mark.parametrize(
    ("on_cpu", "went_on", "found", "passed"),
    [
        (True, 50, [SAME], True),
        (False, 50, [SAME], True),
        (True, 0, [SAME], False),  # it was trained anew, which is no resuming
        (True, 50, [NEAR, SAME], False),
        (True, 50, [NEAR, NEAR], False),  # on a CPU both are wrong
        (False, 50, [FAR, SAME], False),  # two untouched are the same: it was the resuming
        (False, 50, [FAR, FAR], True),
    ],
)
def test_when_a_resumed_training_passes(
    tmp_path: Path,
    on_cpu: bool,
    went_on: int,
    found: list[Apart],
    passed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / notes.HISTORY).write_text(f'{{"step": 0}}\n{{"step": {went_on}}}\n')
    run = SimpleNamespace(
        folder=tmp_path,
        data_name="text",
        config=SimpleNamespace(train=SimpleNamespace(max_steps=100)),
    )
    trained: list[str] = []
    lab: Any = SimpleNamespace(
        run=lambda name: run,
        training_line=lambda name, steps, data: [name],
        kill=lambda name, line, at: at + 1,
        mlxgpt=lambda name: trained.append(name),
    )
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    answers = iter(found)
    monkeypatch.setattr(mac_report, "apart", lambda one, other: next(answers))
    outcome = mac_report.killed_and_resumed(lab)
    assert outcome[0] is passed
    assert trained == ["killed", "twin"][: len(found)]
    assert f"after step 61, it went on from step {went_on} to 100" in outcome[2][0]
    assert ("On a GPU" in "".join(outcome[2])) == (len(found) == 2 and not on_cpu)


@pytest.mark.parametrize("same", [True, False])
def test_one_seed_makes_one_text(same: bool) -> None:
    texts = iter(["to be", "to be" if same else "or not"])

    def generate(*line: str) -> tuple[dict[str, Any], int]:
        assert line == ("generate", "--run", "untouched", "--seed", "1", "--max-tokens", "200")
        return {"texts": [next(texts)], "tokens_per_second": 812.0}, 0

    lab: Any = SimpleNamespace(plan=Plan(), mlxgpt=generate)
    passed, line, body = mac_report.generation(lab)
    assert passed is same
    assert ("812 and 812 tokens/s" in line) is same
    assert ("    or not" in body) is not same


def test_a_text_that_cannot_be_had_is_told_of(tmp_path: Path) -> None:
    lab = new_lab(tmp_path)
    assert mac_report.name_of_text(lab, None) == "Tiny Shakespeare"
    assert "storybook" in mac_report.name_of_text(lab, "proxy.example cannot be reached")
    own = replace(lab, source=tmp_path / "text.txt")
    assert mac_report.name_of_text(own, None) == "one given with SOURCE"


SMALL = "--tier 1 --n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2 --sample-tokens 4"


def test_a_training_that_ends_before_it_is_killed(tmp_path: Path, text_file: Path) -> None:
    lab = Lab(Plan(train=tuple(SMALL.split())), tmp_path / "home", text_file)
    with pytest.raises(RuntimeError, match="it ended before it was killed"):
        lab.kill("killed", lab.training_line("killed", 4, None), 5)
    with pytest.raises(RuntimeError, match=r"ended before it was killed: mlxgpt: .*no-such-text"):
        lab.kill("other", ["train", *SMALL.split(), "--source", "no-such-text.txt"], 5)


@pytest.mark.slow
def test_a_whole_report(
    jane: Path, tmp_path: Path, text: str, tiny_model: Config, capsys: Capture
) -> None:
    source, out = jane / "diary.txt", tmp_path / "out"
    source.write_text(20 * text, encoding="utf-8")
    plan = Plan(
        configs={"tier1": tiny_model},
        bench=bench.Plan(repeats=3, seconds=0.02, prompt_tokens=3, new_tokens=12),
        tests=("tests/test_seeds.py", "-n", "0"),
        train=tuple(SMALL.split()),
        seconds=3.0,
        characters=40,
    )
    assert mac_report.main(["--source", str(source), "--out", str(out)], plan) == 0
    (path,) = out.iterdir()
    page = path.read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[2] == "failed: nothing"
    assert page.count(": passed: ") == 7
    assert "- killed and resumed: passed: the same bits, and the same losses" in page
    (killed,) = re.findall(r"after step ([\d,]+), it went on from step ([\d,]+) to ([\d,]+)", page)
    died, went_on, steps = (int(number.replace(",", "")) for number in killed)
    assert 0 < went_on <= died < steps
    first, last = (float(cells(page, f"loss of the {n} step")[0]) for n in ("first", "last"))
    assert last < first
    for secret in ("jane", "tower", "diary", str(lab_of.ROOT), tempfile.gettempdir()):
        assert secret.lower() not in page.lower(), secret
    assert not re.search(r"(?<![\w./…])/\w+/", page), "no path from the root"
