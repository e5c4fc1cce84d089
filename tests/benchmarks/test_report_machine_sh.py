"""report-machine.sh on simulated machines that have only the commands a test creates."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIRED_COMMANDS = ("sh", "dirname", "mkdir", "chmod", "cp")

# Stands for the download of uv's installer, which installs uv into $UV_UNMANAGED_INSTALL.
CURL = """#!/bin/sh
test -n "{network}" || { echo 'curl: (6) Could not resolve host: astral.sh' >&2; exit 6; }
test "$*" = "-LsSf --output $3 https://astral.sh/uv/install.sh" || exit 99
echo 'cp "{bin}/uv-to-install" "$UV_UNMANAGED_INSTALL/uv"' > "$3"
"""
UV = """#!/bin/sh
echo "uv $* ($UV_PYTHON_PREFERENCE)" >> "{log}"
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin" && cp "{bin}/python-of-uv" "$folder/bin/python"
fi
"""
PYTHON = """#!/bin/sh
echo "python $*" >> "{log}"
exit 1
"""


class SimulatedMachine:
    """A checkout in `folder`/mlxgpt, and a PATH of a shell and the commands that a test adds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "log"
        self.bin.mkdir()
        for name in REQUIRED_COMMANDS:
            executable = shutil.which(name)
            assert executable
            (self.bin / name).symlink_to(executable)
        for name in (".ci/check_system.sh", "benchmarks/report-machine.sh"):
            (folder / "mlxgpt" / name).parent.mkdir(parents=True)
            shutil.copy(ROOT / name, folder / "mlxgpt" / name)
        self.add_system("Linux", "x86_64")
        self.add_command("curl", CURL)
        self.add_command("uv-to-install", UV)
        self.add_command("python-of-uv", PYTHON)

    def add_command(self, name: str, script: str, network: str = "yes") -> None:
        for field, value in {"network": network, "bin": self.bin, "log": self.log}.items():
            script = script.replace("{" + field + "}", str(value))
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def add_system(self, system: str, chip: str) -> None:
        self.add_command("uname", f'#!/bin/sh\ntest "$1" = -s && echo {system} || echo {chip}\n')

    def write_report(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "sh", "mlxgpt/benchmarks/report-machine.sh", *arguments],
            cwd=self.folder,
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
            check=False,
        )

    def read_log(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> SimulatedMachine:
    return SimulatedMachine(tmp_path)


def test_installs_all_into_the_folder_and_writes_the_report_beside_it(
    machine: SimulatedMachine,
) -> None:
    result = machine.write_report("--skip", "tests")
    assert result.returncode == 1, "that of the report"
    assert machine.read_log() == [
        "uv venv --quiet --seed --python 3.13 .venv (only-managed)",
        "uv pip install --quiet --python .venv/bin/python --editable .[dev] (only-managed)",
        f"python benchmarks/machine_report.py --output {machine.folder} --skip tests",
    ]
    assert (machine.folder / "mlxgpt" / ".uv" / "uv").exists()
    checkout = machine.folder / "mlxgpt"  # which may be the user's own, so that it stays
    assert result.stdout.endswith(f": rm -r '{checkout}/.uv' '{checkout}/.venv'\n")
    assert "developer tools" not in result.stdout


def test_a_second_call_does_not_download_uv_or_create_the_environment_again(
    machine: SimulatedMachine,
) -> None:
    machine.write_report()
    machine.add_command("curl", CURL, network="")
    assert machine.write_report().returncode == 1
    assert sum(line.startswith("uv venv") for line in machine.read_log()) == 1
    assert sum(line.startswith("python") for line in machine.read_log()) == 2


def test_an_installed_uv_is_used(machine: SimulatedMachine) -> None:
    machine.add_command("uv", UV)
    machine.add_command("curl", CURL, network="")
    assert machine.write_report().returncode == 1
    assert machine.read_log()[0].startswith("uv venv")


def test_without_a_network_curl_says_so(machine: SimulatedMachine) -> None:
    machine.add_command("curl", CURL, network="")
    result = machine.write_report()
    assert (result.returncode, machine.read_log()) == (6, [])
    assert result.stderr == "curl: (6) Could not resolve host: astral.sh\n"


def test_if_uv_finds_no_python_its_error_is_the_last_line(machine: SimulatedMachine) -> None:
    problem = "error: Failed to download https://github.com/astral-sh/python-build-standalone/…"
    machine.add_command("uv", f"#!/bin/sh\necho '{problem}' >&2\nexit 2\n")
    result = machine.write_report()
    assert (result.returncode, machine.read_log()) == (2, [])
    assert result.stderr == f"{problem}\n"
    assert "To remove" not in result.stdout


def test_a_system_without_an_mlx_wheel_is_refused_before_the_download(
    machine: SimulatedMachine,
) -> None:
    machine.add_system("Darwin", "arm64")
    machine.add_command("sw_vers", "#!/bin/sh\necho 13.6.1\n")
    result = machine.write_report()
    assert result.returncode == 1
    assert "mlxgpt needs macOS 14 or later" in result.stderr
    assert not (machine.folder / "mlxgpt" / ".uv").exists()


@pytest.mark.parametrize("is_installed", [False, True])
def test_a_mac_without_developer_tools_needs_none(
    machine: SimulatedMachine, is_installed: bool
) -> None:
    machine.add_system("Darwin", "arm64")
    machine.add_command("sw_vers", "#!/bin/sh\necho 26.5.1\n")
    machine.add_command("xcode-select", f"#!/bin/sh\nexit {0 if is_installed else 2}\n")
    result = machine.write_report()
    assert machine.read_log()[-1].startswith("python")
    assert ("cancel: they are not needed" in result.stdout) == (not is_installed)
