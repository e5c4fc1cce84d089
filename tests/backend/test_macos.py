"""macOS-only code, tested with a simulated Mac."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mlxgpt.backend import macos
from mlxgpt.cli import main as cli
from mlxgpt.utils.errors import UserError


@pytest.fixture
def fake_mac(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(machine: str, *, translated: bool = False) -> None:
        answer = SimpleNamespace(stdout=f"{int(translated)}\n")
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)

    monkeypatch.setattr(sys, "platform", "linux")  # not a Mac until `make` is called

    return make


def test_apple_silicon_and_other_systems_are_accepted(fake_mac: Any) -> None:
    macos.check_apple_silicon()
    fake_mac("arm64")
    macos.check_apple_silicon()


def test_intel_mac_is_refused(fake_mac: Any) -> None:
    fake_mac("x86_64")
    with pytest.raises(UserError, match="has an Intel processor"):
        macos.check_apple_silicon()


def test_python_under_rosetta_is_refused_with_a_remedy(fake_mac: Any) -> None:
    fake_mac("x86_64", translated=True)
    with pytest.raises(UserError, match="under Rosetta") as error:
        macos.check_apple_silicon()
    assert "Apple silicon" in error.value.remedy


@pytest.mark.parametrize(
    ("platform", "program", "code", "stub"),
    [
        ("darwin", "/usr/bin/git", 2, True),
        ("darwin", "/usr/bin/git", 0, False),
        ("darwin", "/opt/homebrew/bin/git", 2, False),
        ("linux", "/usr/bin/git", 2, False),
    ],
)
def test_xcode_stub_programs_are_detected(
    platform: str, program: str, code: int, stub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command == ["/usr/bin/xcode-select", "-p"]
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(subprocess, "run", run)
    assert macos.is_xcode_stub(program) is stub


def test_missing_sysctl_value_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "run", missing)
    assert macos.sysctl("hw.model") == ""
    monkeypatch.setattr(subprocess, "run", lambda c, **_: SimpleNamespace(stdout=f"{c[-1]}\n"))
    assert macos.sysctl("hw.model") == "hw.model"


def test_every_command_checks_for_apple_silicon(
    fake_mac: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_mac("x86_64")
    assert cli.main(["runs"]) == 2
    assert "Intel" in capsys.readouterr().err


class Process:
    """A fake subprocess that records calls."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.calls, self.options = [*command], options

    def terminate(self) -> None:
        self.calls.append("terminated")

    def wait(self) -> None:
        self.calls.append("waited for")


def test_mac_is_kept_awake_within_prevent_sleep(
    fake_mac: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[Process] = []

    def start(command: list[str], **options: Any) -> Process:
        processes.append(Process(command, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with macos.prevent_sleep():
        assert processes == [], "elsewhere nothing is done"
    fake_mac("arm64")
    with macos.prevent_sleep():
        assert processes[0].calls == ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]
        assert processes[0].options["start_new_session"], "Ctrl-C does not reach it"
    assert processes[0].calls[-2:] == ["terminated", "waited for"]


def test_missing_caffeinate_is_ignored(fake_mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    fake_mac("arm64")
    monkeypatch.setattr(subprocess, "Popen", missing)
    with macos.prevent_sleep():
        pass
