from __future__ import annotations

import pwd
import re
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mac_report_lab as lab_of
import mac_report_page as pages
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mac_report_page import Part, Suite, Trained
from mac_report_power import Power

from mlxgpt.reports.chips import CHIPS, Chip
from tests.benchmarks.made_up import MAC
from tests.reports.measured import cells, tier


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
