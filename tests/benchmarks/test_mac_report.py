from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mac_report
import mac_report_lab as lab_of
import mac_report_page as pages
import mac_report_power as powers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mac_report_lab import Apart, Lab, Plan
from mac_report_page import Part, Suite, Trained
from mac_report_power import Power, heat_warnings, of_linux, of_mac

from mlxgpt.config import Config
from mlxgpt.errors import UserError
from mlxgpt.machine import device, mac
from mlxgpt.reports import bench
from mlxgpt.reports.chips import CHIPS, Chip
from mlxgpt.reports.records import Generation, Machine, Spread, Tier, Training
from mlxgpt.storage import run as runs

Capture = pytest.CaptureFixture[str]

# What `pmset` and `notifyutil` print, as people have shown it of their Macs.
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=1234567)\t80%; AC attached; not charging present: true
"""
ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=1234567)\t78%; discharging; 13:41 remaining present: true
"""
CHARGING = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=1234567)\t7%; charging; (no estimate) present: true
"""
NO_BATTERY = "Now drawing from 'AC Power'\n"
UPS = """Now drawing from 'UPS Power'
 -UPS CP1500 (id=1234567)\t93%; discharging; 0:21 remaining present: true
"""
SETTINGS = """System-wide power settings:
 SleepDisabled          0
Currently in use:
 lidwake              1
 lowpowermode         1
 standbydelayhigh     86400
 standby              1
 hibernatefile        /var/vm/sleepimage
 sleep                1 (sleep prevented by bluetoothd, coreaudiod)
 disksleep            10
"""
NEWER_SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 displaysleep         0 (display sleep prevented by caffeinate, caffeinate)
 powermode            2
 womp                 1
"""
OLD_SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 powernap             1
 halfdim              1
"""
QUIET = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
THROTTLED = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
2026-06-26 12:30:37 +0200 CPU Power notify
\tCPU_Scheduler_Limit \t= 40
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 28
"""
COOL = """2026-06-26 12:30:37 +0200 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 100
"""
WARNED = """2026-08-20 13:11:08 +0700 Thermal Warning Level = 2
Note: No performance warning level has been recorded
"""
REFUSED = "Error: No thermal warning level with error code 0xe00002c2\n"


@pytest.mark.parametrize(
    ("text", "source", "percent"),
    [
        (ON_MAINS, "AC Power", 80),
        (ON_BATTERY, "Battery Power", 78),
        (CHARGING, "AC Power", 7),
        (NO_BATTERY, "AC Power", None),
        (UPS, "UPS Power", None),
        ("No batteries available.\n", None, None),
        ("", None, None),
    ],
)
def test_what_feeds_a_mac(text: str, source: str | None, percent: int | None) -> None:
    found = of_mac(text, "", "", "")
    assert found == Power(source=source, percent=percent)
    assert found.caution == ("on battery" if text == ON_BATTERY else "")


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (SETTINGS, "low power"),
        (SETTINGS.replace("lowpowermode         1", "lowpowermode         0"), "normal"),
        (NEWER_SETTINGS, "high power"),
        (" lowpowermode         0\n powermode            1\n", "low power"),
        (" powermode            3\n", "unknown (3)"),
        (OLD_SETTINGS, None),
        ("", None),
    ],
)
def test_a_macs_power_mode(text: str, mode: str | None) -> None:
    found = of_mac("", text, "", "")
    assert found == Power(mode=mode)
    assert ("in low power mode" in found.caution) == (mode == "low power")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (QUIET, "no thermal warning"),
        (COOL, "no thermal warning"),
        (THROTTLED, "CPU limited to 28 %"),
        (WARNED, "thermal warning level 2"),
        (WARNED + THROTTLED, "thermal warning level 2, CPU limited to 28 %"),
        ("Performance Warning Level = 1\n", "performance warning level 1"),
        ("Thermal Warning Level = 0\n", "no thermal warning"),
        (REFUSED, None),
        ("", None),
    ],
)
def test_what_a_mac_tells_of_heat(text: str, words: str | None) -> None:
    assert heat_warnings(text) == words
    assert of_mac("", "", text, "") == Power(warnings=words)


@pytest.mark.parametrize(
    ("text", "pressure"),
    [
        ("com.apple.system.thermalpressurelevel 0", "nominal"),
        ("com.apple.system.thermalpressurelevel 2\n", "heavy"),
        ("com.apple.system.thermalpressurelevel 9", "level 9"),
        ("com.apple.system.thermalpressurelevel: Failed with code 1", None),
        ("com.apple.system.something 3", None),
        ("", None),
    ],
)
def test_a_macs_thermal_pressure(text: str, pressure: str | None) -> None:
    assert of_mac("", "", "", text) == Power(pressure=pressure)


def test_each_tool_of_a_mac_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        ("/usr/bin/pmset", "-g", "batt"): ON_BATTERY,
        ("/usr/bin/pmset", "-g"): SETTINGS,
        ("/usr/bin/pmset", "-g", "therm"): THROTTLED,
        ("/usr/bin/notifyutil", "-g", powers.PRESSURE): f"{powers.PRESSURE} 1",
    }
    monkeypatch.setattr(powers, "printed", lambda *command: answers[command])
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(powers.power()) == (
        "Battery Power, battery at 78 %, low power mode, thermal pressure moderate, "
        "CPU limited to 28 %"
    )
    monkeypatch.setattr(powers, "printed", lambda *command: "")
    assert str(powers.power()) == "it does not tell"


def test_a_tool_that_is_not_there_prints_nothing() -> None:
    assert powers.printed("/usr/bin/there-is-no-such-tool", "-g") == ""
    assert powers.printed(sys.executable, "-c", "print(3); raise SystemExit(2)") == "3"


def supply(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, word in files.items():
        (folder / name).write_text(word + "\n")


def test_what_feeds_a_linux_machine(tmp_path: Path) -> None:
    assert of_linux(tmp_path / "none") == Power()
    supply(tmp_path / "hid-mouse", type="Battery", scope="Device", capacity="3", status="Unknown")
    assert of_linux(tmp_path) == Power(), "a mouse's battery feeds no computer"
    supply(tmp_path / "BAT0", type="Battery", capacity="55", status="Discharging")
    supply(tmp_path / "AC", type="Mains", online="0")
    assert of_linux(tmp_path) == Power("Battery Power", 55)
    (tmp_path / "AC" / "online").write_text("1\n")
    (tmp_path / "BAT0" / "status").write_text("Charging\n")
    assert of_linux(tmp_path) == Power("AC Power", 55)
    (tmp_path / "BAT0" / "capacity").unlink()
    assert of_linux(tmp_path) == Power("AC Power")


MAC = Machine(
    chip="Apple M1 Pro",
    backend="metal",
    cores=10,
    performance_cores=8,
    memory=17_179_869_184,
    system="macOS-14.5-arm64-arm-64bit",
    blas="MLX's own",
    versions={"mlxgpt": "0.1.0", "mlx": "0.32.4", "numpy": "2.4.1", "Python": "3.12.4"},
    commit="0123456789ab",
    load=1.234,
    bandwidth=180e9,
)


@pytest.mark.parametrize(
    ("name", "backend", "chip"),
    [
        ("Apple M1", "metal", "M1"),
        ("Apple M1 Pro", "metal", "M1 Pro"),
        ("Apple M4 Max", "metal", "M4 Max"),
        ("Apple M9", "metal", None),
        ("Apple M1", "cpu", None),
        ("AMD EPYC", "cpu", None),
    ],
)
def test_which_prediction_belongs_to_a_chip(name: str, backend: str, chip: str | None) -> None:
    found = pages.chip_of(replace(MAC, chip=name, backend=backend))
    assert (found.name if found else None) == chip


def tier(name: str, parameters: int, flops: int, bytes_per_token: int) -> Tier:
    training = Training(
        tokens_per_step=2048,
        plan_tokens=36_000_000,
        flops_per_token=flops,
        warmup_steps=3,
        steps_per_repeat=11,
        ms_per_step=Spread.of([205.4, 198.2, 231.9, 204.0, 207.7]),
        tokens_per_second=9970.8,
        matmul_peak=187.4e9,
        peak_share=0.3644,
        peak_memory=345_678_901,
        peak_memory_of="the whole process",
    )
    generation = Generation(
        prompt_tokens=17,
        new_tokens=199,
        bytes_per_token=bytes_per_token,
        ms_to_first_token=Spread.of([8.124, 7.911, 9.339, 8.0, 8.5]),
        tokens_per_second=Spread.of([812.2, 799.0, 820.9, 811.0, 814.0]),
    )
    return Tier(name, parameters, "float32", training, generation, {})


def cells(text: str, row: str) -> list[str]:
    """The cells of the first table row that begins with `row`, without it."""
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if x[:1] == "|"]
    return next(others for first, *others in rows if first == row)


def chip(name: str) -> Chip:
    return next(chip for chip in CHIPS if chip.name == name)


def test_speed_stands_beside_what_was_predicted() -> None:
    large = tier("tier2", 12_300_000, 65_000_000, 50_000_000)
    text = "\n".join(pages.speed_lines(large, chip("M1 Pro")))
    # 2048 tokens in 204 to 232 ms; a quarter of 5.2 TFLOPS, over 65 MFLOP; 200 GB/s over 50 MB.
    for row, wanted in (
        ("training, tokens/s", ["9,970 (8,830 to 10,300)", "20,000", "0.50"]),
        ("training, ms a step", ["205 (198 to 232)", "", ""]),
        ("peak of a matrix product, TFLOPS", ["0.187", "5.2", "0.04"]),
        ("training's share of that peak, %", ["36.4", "25", "1.46"]),
        ("peak memory in training, MB, of the whole process", ["346", "", ""]),
        ("generation, first token after, ms", ["8.12 (7.91 to 9.34)", "", ""]),
        ("generation, tokens/s (*predicted*: at most)", ["812 (799 to 821)", "4,000", "0.20"]),
    ):
        assert cells(text, row) == wanted, row
    assert "less was to be expected" not in text


def test_where_no_or_two_bandwidths_are_known() -> None:
    small = tier("tier1", 1_024_416, 2_500_000, 4_000_000)
    name = "generation, tokens/s (*predicted*: at most)"
    two = "\n".join(pages.speed_lines(small, chip("M4 Max")))
    assert cells(two, name)[1:] == ["100,000 to 140,000", "0.01 to 0.01"]
    assert "less was to be expected" in two, "no model that small was ever measured there"
    assert cells("\n".join(pages.speed_lines(small, chip("M5"))), name)[1:] == ["", ""]
    unknown = pages.speed_lines(small, None)
    assert cells("\n".join(unknown), name) == ["812 (799 to 821)"]
    assert unknown[-1] == "No prediction for this chip."


TRAINED = Trained(
    text="Tiny Shakespeare",
    vocabulary=65,
    steps=1400,
    first_loss=4.2412,
    last_loss=1.8123,
    val_loss=1.9,
    first_rate=90_000.0,
    last_rate=81_000.0,
    peak_memory=345_678_901,
    before=Power("AC Power", 80, "normal", "nominal", "no thermal warning"),
    after=Power("AC Power", 80, "normal", "moderate", "no thermal warning"),
)


def test_a_page_by_hand() -> None:
    suite = Suite(2, 1, 0, [("tests.test_x::test_y[a|b]", "assert 1 == 2")], 12.0)
    checks: list[dict[str, Any]] = [
        {"name": "initial loss", "ok": True, "detail": "4.21 nats"},
        {"name": "causality", "ok": False, "detail": "changing a|b"},
        {"name": "steps repeat", "ok": None, "detail": "only to 1e-7"},
    ]
    parts = [
        Part("the machine", True, "Apple M1", pages.machine_lines(MAC, "Mac14,3", TRAINED.before)),
        Part("the self-check", False, "causality", pages.check_lines(checks)),
        Part("the tests", False, "1 failed", pages.failure_lines(suite)),
        Part("speed of tier1", False, "no memory"),
        Part("a training", True, "it learned", pages.trained_lines(TRAINED)),
    ]
    text = pages.page("2026-11-24T10:00:00+00:00", "Apple M1 Pro", "Darwin", parts)
    assert text.startswith("# mac-report: Apple M1 Pro, 2026-11-24\n\nMade by `make mac-report`")
    assert "no Mac" not in text
    for line in (
        "- the machine: passed: Apple M1",
        "- the self-check: failed: causality",
        "- speed of tier1: failed: no memory",
        "## The tests",
        "    tests.test_x::test_y[a|b]",
        "        assert 1 == 2",
    ):
        assert line in text.splitlines(), line
    assert "## Speed of tier1" not in text, "there is nothing to tell"
    assert re.search(r"^\| causality +\| FAILED +\| changing a\\\|b +\|$", text, re.M)
    assert cells(text, "steps repeat") == ["told", "only to 1e-7"]
    for row, wanted in (
        ("model", "Mac14,3"),
        ("cores", "10, 8 of them fast"),
        ("memory", "17.2 GB"),
        ("memory's bandwidth", "180 GB/s"),
        ("system", "macOS-14.5-arm64-arm-64bit"),
        ("mlx", "0.32.4"),
        ("Python", "3.12.4"),
        ("commit", "0123456789ab"),
        ("load before", "1.23"),
        ("loss of the first step", "4.241"),
        ("ln 65", "4.174"),
        ("loss of the last step", "1.812"),
        ("tokens/s in the first fifth", "90,000"),
        ("tokens/s in the last fifth", "81,000, 0.90 of the first"),
        ("peak memory", "346 MB"),
        ("power after", str(TRAINED.after)),
    ):
        assert cells(text, row) == [wanted], row
    before = "AC Power, battery at 80 %, normal mode, thermal pressure nominal, no thermal warning"
    assert cells(text, "power") == [before]


def test_a_page_of_another_machine_says_so_at_once() -> None:
    text = pages.page("2026-11-24T10:00:00+00:00", "AMD EPYC", "Linux", [])
    assert text.splitlines()[2].startswith("no Mac: this was made on Linux")


def test_a_pages_name() -> None:
    date = "2026-11-24T23:59:00+00:00"
    assert pages.stem(date, MAC) == "2026-11-24-m1-pro-mac-report"
    assert pages.stem(date, None) == "2026-11-24-chip-mac-report"


OWN = [
    ("CHECKOUT", "/Users/jane/Code/mlxgpt"),
    ("HOME", "/Users/jane"),
    ("TEMP", "/var/folders/x1/abc_9/T"),
    ("HOST", "Janes-MacBook-Pro.local"),
    ("HOST", "Janes-MacBook-Pro"),
    ("USER", "Jane Doe"),
    ("USER", "jane"),
]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("at /Users/jane/Code/mlxgpt/tests/a.py", "at CHECKOUT/tests/a.py"),
        ("'/Users/jane/My Diary/may.txt'", "'HOME/My Diary/may.txt'"),
        ("/var/folders/x1/abc_9/T/pytest-of-jane/a", "TEMP/pytest-of-USER/a"),
        ("by Jane Doe on janes-macbook-pro.local", "by USER on HOST"),
        ("JANE, jane_2, janet", "USER, USER_2, janet"),
        ("no such file: '/Volumes/My Disk/x y.txt'", "no such file: '…/x y.txt'"),
        ("open:/opt/homebrew/bin/python3", "open:…/python3"),
        ("file:///Library/Python/x.py, line 3", "…/x.py, line 3"),
        ("from 192.168.1.23:8080 to fe80::1c3a:22ff%en0", "from ADDRESS:8080 to ADDRESS"),
        ("link a4:83:e7:01:02:ff", "link ADDRESS"),
    ],
)
def test_what_is_private_goes(text: str, wanted: str) -> None:
    assert pages.private(text, OWN) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "9,970 tokens/s, 1/4 of it, and/or 3 / 4",
        "https://docs.astral.sh/uv/ at 12:30:37",
        "OpenBLAS 0.3.34.481.3 on macOS-14.5-arm64-arm-64bit",
        "tests.reports.test_bench::test_a[b::c]",
        "2026-11-24T23:59:58+00:00",
    ],
)
def test_what_is_not_private_stays(text: str) -> None:
    assert pages.private(text, OWN) == text


NAMES = st.text(st.characters(categories=["Ll", "Lu"], max_codepoint=0x24F), min_size=3)


@given(NAMES, NAMES, st.text(max_size=40), st.text(max_size=40))
def test_no_folder_and_no_name_is_left(user: str, host: str, before: str, after: str) -> None:
    own = [("HOME", f"/Users/{user}"), ("HOST", host), ("USER", user)]
    own = [pair for pair in own if pair[1].upper() not in (*pages.HIDDEN, "USERS")]
    text = f"{before} /Users/{user}/x/y.txt {user}@{host} {after}"
    found = pages.private(text, own)
    for _, secret in own:
        assert not re.search(rf"(?<![^\W\d_]){re.escape(secret)}(?![^\W\d_])", found, re.I)
    assert pages.private(found, own) == found, "there is no more to do"


@pytest.fixture
def jane(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Somebody's machine, with their name and its own; their home."""
    home = tmp_path / "Homes" / "janedoe"
    home.mkdir(parents=True)
    account = SimpleNamespace(pw_name="janedoe", pw_gecos="Jane Q. Doe,,,")
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "janedoe")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)
    monkeypatch.setattr(socket, "gethostname", lambda: "Tower-of-Jane.fritz.box")
    return home


def test_whose_words_they_are(jane: Path) -> None:
    own = pages.own_words()
    for pair in (
        ("HOME", str(jane)),
        ("TEMP", tempfile.gettempdir()),
        ("CHECKOUT", str(lab_of.ROOT)),
        ("USER", "janedoe"),
        ("USER", "Jane Q. Doe"),
        ("HOST", "Tower-of-Jane.fritz.box"),
        ("HOST", "Tower-of-Jane"),
    ):
        assert pair in own
    assert own.index(("USER", "Jane Q. Doe")) < own.index(("USER", "janedoe")), "the longer first"


def test_names_that_are_nobodys_are_left(jane: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the page would speak of "HOST-report"."""
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="m1", pw_gecos=""))
    monkeypatch.setattr(socket, "gethostname", lambda: "mac.local")
    monkeypatch.setenv("HOME", "/")
    words = {secret for _, secret in pages.own_words()}
    assert not words & {"root", "m1", "mac", "", "/"}
    assert "mac.local" in words


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


def new_lab(home: Path, **plan: Any) -> Lab:
    home.mkdir(exist_ok=True)
    return Lab(replace(Plan(), **plan), home, None)


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


def checks(*oks: bool | None) -> list[dict[str, Any]]:
    return [{"name": f"check {n}", "ok": ok, "detail": "seen"} for n, ok in enumerate(oks)]


@pytest.mark.parametrize(
    ("oks", "passed", "line"),
    [((True, None), True, "2 checks"), ((False, True, False), False, "check 0, check 2")],
)
def test_a_check_that_fails_is_named(oks: Sequence[bool | None], passed: bool, line: str) -> None:
    lab: Any = SimpleNamespace(mlxgpt=lambda *_: (checks(*oks), 0))
    found = mac_report.self_check(lab)
    assert found[:2] == (passed, line)
    assert any("check 0" in row for row in found[2])


def test_a_command_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    lab = new_lab(tmp_path / "home")
    with pytest.raises(RuntimeError, match=r"^mlxgpt: there is no run 'none' in .*home/runs"):
        lab.mlxgpt("generate", "--run", "none")
    tree, peak = lab.mlxgpt("runs")
    assert tree == []
    assert 10e6 < peak < 10e9


def test_a_command_that_takes_too_long_is_killed_with_what_it_began(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(RuntimeError, match="it took more than 0 minutes"):
        lab_of.ran([sys.executable, "-c", code], 3.0)
    child = int((tmp_path / "pid").read_text())
    for _ in range(200):
        status = Path(f"/proc/{child}/stat")
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return  # dead, and nobody has asked for how it ended
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child lives on")


def test_what_a_command_said_last() -> None:
    ended = lab_of.Ended(2, "out\n", "mlxgpt: it is so\n  → do this\n\n", 1.0)
    assert ended.last == "mlxgpt: it is so"
    assert lab_of.Ended(-6, "", "\n", 1.0).last == "its process ended with code -6"


def line_at(step: int, rate: float) -> dict[str, float]:
    return {"step": step, "tokens_per_second": rate}


def test_how_many_steps_fit() -> None:
    # A warm half at 2,000 tokens a second, after a cold one.
    lines = [line_at(n, 10.0 if n < 4 else 2000.0) for n in range(1, 7)]
    assert lab_of.steps_in(30.0, lines, 1000) == 60
    assert lab_of.steps_in(0.1, lines, 1000) == lab_of.FEWEST_STEPS


def test_rates_of_the_first_and_the_last_fifth() -> None:
    # Unequal distances: 10 steps at 100, 10 at 300, then slow, and in the end 5 at 50, 15 at 150.
    lines = [line_at(10, 100.0), line_at(20, 300.0), line_at(50, 7.0), line_at(80, 7.0)]
    lines += [line_at(85, 50.0), line_at(100, 150.0)]
    first, last = lab_of.rates_of_fifths(lines, 100)
    assert first == pytest.approx(20 / (10 / 100 + 10 / 300))
    assert last == pytest.approx(20 / (5 / 50 + 15 / 150))


def test_a_trainings_command_line(tmp_path: Path) -> None:
    lab = Lab(Plan(), tmp_path, tmp_path / "text.txt")
    line = " ".join(lab.training_line("first", 1000, None))
    assert line.startswith(f"train --tier 1 --run first --max-steps 1000 --source {lab.source} ")
    assert line.endswith("--warmup-steps 100 --save-interval 250 --eval-interval 250 "
                         "--log-interval 10")  # fmt: skip
    assert f"--source {tmp_path}/data/text-char " in " ".join(
        lab.training_line("a", 9, "text-char")
    )
    bare = replace(lab, source=None).training_line("first", 20, None)
    assert "--source" not in bare, "Tier 1 gets its own text"
    assert bare[-1] == "1"
    assert bare[bare.index("--warmup-steps") + 1] == "2", "a tenth of a short training"


@pytest.mark.usefixtures("no_check")
def test_how_far_two_trainings_are_apart(home: Path, train: Any) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(name, seed=seed)
    a, b, c = (runs.open_run(home / "runs" / name) for name in "abc")
    same = lab_of.apart(a, b)
    assert same.same
    assert str(same) == "the same bits, and the same losses"
    other = lab_of.apart(a, c)
    assert not other.same
    assert not other.bits
    assert other.largest > 1e-3
    assert other.losses > 1e-3
    assert str(other).startswith("weights apart by at most ")
    metrics = c.folder / runs.METRICS
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(RuntimeError, match="did not log the same steps"):
        lab_of.apart(a, c)


@pytest.mark.usefixtures("no_check")
def test_losses_alone_tell_two_trainings_apart(home: Path, train: Any) -> None:
    train("a")
    shutil.copytree("runs/a", "runs/b")
    metrics = Path("runs/b") / runs.METRICS
    metrics.write_text(re.sub(r'"loss": [\d.]+', '"loss": 9.0', metrics.read_text(), count=1))
    found = lab_of.apart(*(runs.open_run(home / "runs" / name) for name in "ab"))
    assert found.bits
    assert not found.same


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
    (tmp_path / runs.HISTORY).write_text(f'{{"step": 0}}\n{{"step": {went_on}}}\n')
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
