"""What feeds a machine, and how warm it says it is, for mac_report.py: from `pmset` and
`notifyutil`, which every Mac has and anybody may ask, or on Linux from /sys.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# `pmset -g therm` mostly has nothing to tell on Apple silicon, however hot it is; this level moves.
# Where a macOS has no such thing, it reads 0, too.
PRESSURE = "com.apple.system.thermalpressurelevel"
PRESSURES = ("nominal", "moderate", "heavy", "trapping", "sleeping")
MODES = {"0": "normal", "1": "low power", "2": "high power"}


@dataclass(frozen=True)
class Power:
    """What feeds the machine, and how warm it says it is; None for what it does not tell.

    Attributes:
        source: as macOS calls it: AC Power, Battery Power, UPS Power.
        percent: of the battery.
        mode: normal, low power or high power.
        pressure: the level of thermal pressure, from nominal to sleeping.
        warnings: what else is recorded of heat.
    """

    source: str | None = None
    percent: int | None = None
    mode: str | None = None
    pressure: str | None = None
    warnings: str | None = None

    def __str__(self) -> str:
        battery = None if self.percent is None else f"battery at {self.percent} %"
        mode = f"{self.mode} mode" if self.mode else None
        pressure = f"thermal pressure {self.pressure}" if self.pressure else None
        told = [word for word in (self.source, battery, mode, pressure, self.warnings) if word]
        return ", ".join(told) or "it does not tell"

    @property
    def caution(self) -> str:
        """What may slow everything; mostly nothing."""
        found = ["on battery"] if self.source == "Battery Power" else []
        found += ["in low power mode"] if self.mode == "low power" else []
        return ", ".join(found)


def power() -> Power:
    """That of this machine, now."""
    if sys.platform != "darwin":
        return of_linux(Path("/sys/class/power_supply"))
    pmset = ("/usr/bin/pmset", "-g")
    pressure = printed("/usr/bin/notifyutil", "-g", PRESSURE)
    return of_mac(printed(*pmset, "batt"), printed(*pmset), printed(*pmset, "therm"), pressure)


def of_mac(battery: str, settings: str, heat: str, pressure: str) -> Power:
    """From what `pmset -g batt`, `pmset -g`, `pmset -g therm` and `notifyutil -g` print; of each
    that prints nothing, nothing.
    """
    source = re.search(r"^Now drawing from '([^']+)'", battery, re.M)
    percent = re.search(r"InternalBattery\S*[^\n]*?\b(\d{1,3})%", battery)
    # `powermode` is what newer systems call it, and may stand beside the other.
    mode = re.search(r"^\s*powermode\s+(\d)\b", settings, re.M)
    mode = mode or re.search(r"^\s*lowpowermode\s+(\d)\b", settings, re.M)
    level = re.search(rf"^{re.escape(PRESSURE)} (\d+)$", pressure, re.M)
    return Power(
        source=source[1] if source else None,
        percent=int(percent[1]) if percent else None,
        mode=MODES.get(mode[1], f"unknown ({mode[1]})") if mode else None,
        pressure=_pressure(int(level[1])) if level else None,
        warnings=heat_warnings(heat),
    )


def _pressure(level: int) -> str:
    return PRESSURES[level] if level < len(PRESSURES) else f"level {level}"


def heat_warnings(heat: str) -> str | None:
    """What `pmset -g therm` tells, in words; None where it tells nothing."""
    levels = re.findall(r"\b(thermal|performance) warning level\s*[=:]\s*(\d+)", heat, re.I)
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", heat)
    found = [f"{kind.lower()} warning level {level}" for kind, level in levels if int(level)]
    if limit and int(limit[1]) < 100:
        found.append(f"CPU limited to {limit[1]} %")
    quiet = levels or limit or re.search("No thermal warning level has been recorded", heat)
    return ", ".join(found) or ("no thermal warning" if quiet else None)


def of_linux(supplies: Path) -> Power:
    """From the folder of a Linux machine's power supplies; a mouse's battery does not count."""
    mains, battery = None, None
    for supply in sorted(supplies.glob("*")):
        if _word(supply / "scope") == "Device":
            continue
        if _word(supply / "type") == "Battery":
            battery = battery or supply
        elif _word(supply / "online"):
            mains = mains or _word(supply / "online") == "1"
    discharging = battery and _word(battery / "status") == "Discharging"
    percent = _word(battery / "capacity") if battery else ""
    return Power(
        source="AC Power" if mains else "Battery Power" if discharging else None,
        percent=int(percent) if percent.isdecimal() else None,
    )


def _word(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace").strip()
    return ""


def printed(*command: str) -> str:
    """What a command prints; nothing if it is not there, or does not end."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
        return ended.stdout.strip()
    return ""
