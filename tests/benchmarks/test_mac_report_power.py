from __future__ import annotations

import sys
from pathlib import Path

import mac_report_power as powers
import pytest
from mac_report_power import Power, heat_warnings, of_linux, of_mac

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
