"""Test the Makefile on simulated machines that have only the commands a test creates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxgpt.backend import macos

ROOT = Path(__file__).parents[1]
REQUIRED_COMMANDS = ("make", "sh", "rm", "touch", "echo", "mkdir")

# A fake Python that answers the Makefile's checks and copies itself into a venv.
PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {unsuitable} ;;
  *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip --version"*) exit 0 ;;
  *"pip install"*) echo "$*" >> installed ;;
esac
"""
UV = """#!/bin/sh
for folder; do :; done
mkdir -p "$folder/bin" && cp "`dirname $0`/python-of-uv" "$folder/bin/python"
"""
UNAME = """#!/bin/sh
test "$1" = -s && echo {system} || echo {machine}
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout, with a PATH of make, a shell and the commands that a test adds."""
    make_path = shutil.which("make")
    if make_path is None or macos.is_xcode_stub(make_path):
        pytest.skip("make is not installed")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in (*REQUIRED_COMMANDS, "cp", "dirname"):
        executable = shutil.which(name)
        if executable:
            (commands / name).symlink_to(executable)
    write_script(tmp_path, "uname", UNAME.format(system="Linux", machine="x86_64"))
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "pyproject.toml", ".ci/check_system.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def write_script(machine: Path, name: str, script: str) -> None:
    (machine / "bin" / name).write_text(script)
    (machine / "bin" / name).chmod(0o755)


def run_make(machine: Path, *goals: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine / "bin" / "make", *goals],
        cwd=machine,
        env={"PATH": str(machine / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )


def read_installs(machine: Path) -> list[str]:
    file = machine / "installed"
    return file.read_text().splitlines() if file.exists() else []


def test_without_python_and_uv_it_explains_how_to_get_python(machine: Path) -> None:
    write_script(machine, "python3", PYTHON.format(unsuitable=1))  # such as Apple's Python 3.9
    result = run_make(machine, "venv")
    assert result.returncode != 0
    assert "mlxgpt needs Python 3.11 or later: get one from python.org" in result.stderr
    assert not (machine / ".venv").exists()


def test_suitable_python_is_found_and_installs_once(machine: Path) -> None:
    write_script(machine, "python3", PYTHON.format(unsuitable=1))
    write_script(machine, "python3.12", PYTHON.format(unsuitable=0))
    assert run_make(machine, "venv").returncode == 0
    assert len(read_installs(machine)) == 1
    assert run_make(machine, "venv").returncode == 0
    assert len(read_installs(machine)) == 1, "the second call installs nothing"
    assert run_make(machine, "dev").returncode == 0
    assert read_installs(machine)[1:] != []
    later = time.time() + 10  # make 3.81 compares whole seconds
    os.utime(machine / "pyproject.toml", (later, later))
    assert run_make(machine, "venv").returncode == 0
    assert len(read_installs(machine)) == 3, "what it asks for may have changed"


def test_uv_alone_is_enough(machine: Path) -> None:
    write_script(machine, "uv", UV)
    write_script(machine, "python-of-uv", PYTHON.format(unsuitable=0))
    assert run_make(machine, "venv").returncode == 0
    assert len(read_installs(machine)) == 1


def test_a_mac_needs_apple_silicon(machine: Path) -> None:
    write_script(machine, "python3", PYTHON.format(unsuitable=0))
    write_script(machine, "uname", UNAME.format(system="Darwin", machine="x86_64"))
    result = run_make(machine, "venv")
    assert result.returncode != 0
    assert "needs a Mac with Apple silicon" in result.stderr
    write_script(machine, "uname", UNAME.format(system="Darwin", machine="arm64"))
    assert run_make(machine, "venv").returncode == 0


@pytest.mark.parametrize(
    ("command", "answer", "problem"),
    [
        ("sw_vers", "13.6.1", "macOS 14"),
        ("sw_vers", "9.2", "macOS 14"),
        ("sw_vers", "13", "macOS 14"),
        ("sw_vers", "14.0", ""),
        ("sw_vers", "26.5.1", ""),
        ("getconf", "glibc 2.9", "glibc 2.35"),
        ("getconf", "glibc 2.17", "glibc 2.35"),
        ("getconf", "glibc 2.34", "glibc 2.35"),
        ("getconf", "glibc 2.35", ""),
        ("getconf", "glibc 2.41", ""),
        ("getconf", "", ""),
    ],
)
def test_system_without_an_mlx_wheel_is_refused_before_pip(
    machine: Path, command: str, answer: str, problem: str
) -> None:
    write_script(machine, "python3", PYTHON.format(unsuitable=0))
    system, chip = ("Darwin", "arm64") if command == "sw_vers" else ("Linux", "x86_64")
    write_script(machine, "uname", UNAME.format(system=system, machine=chip))
    write_script(machine, command, f"#!/bin/sh\necho {answer}\n")
    result = run_make(machine, "venv")
    assert (result.returncode != 0) == bool(problem), result.stderr
    assert read_installs(machine) == [] if problem else len(read_installs(machine)) == 1
    assert f"mlxgpt needs {problem}" in result.stderr or not problem


def test_report_machine_installs_the_dev_extra_and_passes_its_arguments(machine: Path) -> None:
    recording = '  *machine_report.py*) echo "$*" > reported ;;\nesac'
    write_script(machine, "python3", PYTHON.format(unsuitable=0).replace("esac", recording))
    assert (
        run_make(machine, "report-machine", "SOURCE=my text.txt", "ARGS=--output there").returncode
        == 0
    )
    assert read_installs(machine)[-1].endswith(".[dev]")
    reported = (machine / "reported").read_text().strip()
    assert reported == "benchmarks/machine_report.py --source my text.txt --output there"
    assert run_make(machine, "report-machine").returncode == 0
    assert (machine / "reported").read_text().strip() == "benchmarks/machine_report.py"


def test_tier2_report_trains_judges_and_writes_one_page(machine: Path) -> None:
    write_script(machine, "python3", PYTHON.format(unsuitable=0))
    write_script(machine, "mlxgpt", '#!/bin/sh\necho "$*" >> commands\n')
    assert run_make(machine, "dev").returncode == 0
    (machine / ".venv" / "bin" / "mlxgpt").symlink_to(machine / "bin" / "mlxgpt")
    result = run_make(machine, "tier2-report", "RECIPE=modern", "SOURCE=my text.txt")
    assert result.returncode == 0, result.stderr
    run = "tier2-modern-report"
    assert (machine / "commands").read_text().splitlines() == [
        f"train --tier 2 --recipe modern --run {run} --source my text.txt",
        f"eval --run {run} --quality",
        f"report {run} --output {run}.html",
    ]


@pytest.mark.parametrize(
    ("version", "platform", "chip", "suitable"),
    [
        ((3, 9), "linux", "x86_64", False),
        ((3, 11), "linux", "x86_64", True),
        ((3, 14), "darwin", "arm64", True),
        ((3, 12), "darwin", "x86_64", False),
    ],
)
def test_which_pythons_are_suitable(
    version: tuple[int, int], platform: str, chip: str, suitable: bool
) -> None:
    """Run the Makefile's own check in a Python that reports a different version."""
    text = (ROOT / "Makefile").read_text().split("SUITABLE := '")[1].rsplit("'", 1)[0]
    expression = text.replace("\\\n", " ")
    fake_platform = (
        f"import os, sys, types, venv, ensurepip; sys.version_info = {version}; "
        f"sys.platform = {platform!r}; "
        f"os.uname = lambda: types.SimpleNamespace(machine={chip!r}); "
    )
    code = fake_platform + f"exec({expression!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.stderr == b""
    assert (result.returncode == 0) == suitable
