"""Detection of mlx.launch from environment variables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mlxgpt.distributed import launcher

LAUNCHER_VARIABLES = (
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def no_launcher_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_is_not_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher.is_launched()
    assert launcher.get_rank() == 0
    assert launcher.prepend_launcher("mlxgpt train") == "mlxgpt train"
    hosts = tmp_path / "hosts"
    hosts.write_text("\n")  # mlx.launch's file for one process
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert not launcher.is_launched()
    assert launcher.read_hostfile() == []


@pytest.mark.parametrize(
    ("ips", "given"),
    [(["127.0.0.1"] * 3, "-n 3"), (["10.0.0.1", "10.0.0.2"], "--hostfile YOURS.json")],
)
def test_rank_hosts_and_command_of_launched_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ips: list[str], given: str
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(json.dumps([[f"{ip}:5000"] for ip in ips]))
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "2")
    assert launcher.is_launched()
    assert launcher.get_rank() == 2
    assert launcher.read_hostfile() == ips
    assert launcher.prepend_launcher("mlxgpt train") == f"mlx.launch {given} -- mlxgpt train"
    monkeypatch.setattr(sys, "argv", ["/opt/bin/mlxgpt", "train", "--source", "my text.txt"])
    expected = f"mlx.launch {given} -- mlxgpt train --source 'my text.txt'"
    assert launcher.resume_command() == expected


def test_resume_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/lib/mlxgpt/__main__.py", "train", "--tier", "2"])
    assert launcher.resume_command() == "mlxgpt train --tier 2"
    monkeypatch.setattr(sys, "argv", ["my.py", "--fast"])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "my.py", "--fast"])
    assert launcher.resume_command() == "python my.py --fast"


@pytest.mark.parametrize("name", ["MLX_IBV_DEVICES", "MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_other_backends_are_detected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4")
    assert launcher.is_launched()
    monkeypatch.setenv(name, "1")
    assert not launcher.is_launched()
