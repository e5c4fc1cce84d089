from __future__ import annotations

import builtins
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

import httpx
import pytest

import mlxgpt
from mlxgpt.cli import main as cli
from mlxgpt.playground import server
from mlxgpt.playground.play import INSTALL_COMMAND
from mlxgpt.utils.errors import UserError


def test_play_serves_until_ctrl_c(place: Path) -> None:
    command = [sys.executable, "-m", "mlxgpt", "play", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = process.stderr.readline()
        match = re.search(r"(http://127\.0\.0\.1:\d+)/#(\S+)", line)
        assert match
        key = {"Authorization": f"Bearer {match[2]}"}
        assert "key" in process.stderr.readline()
        assert httpx.get(f"{match[1]}/api/run", headers=key, trust_env=False).json()["step"] == 12
        process.send_signal(signal.SIGINT)
        stderr = process.stderr.read()
        assert process.wait(300) in (0, 130)
        assert "Traceback" not in stderr


def test_play_opens_the_browser(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urls: list[str] = []
    monkeypatch.setattr(webbrowser, "open", urls.append)

    class FakeServer:
        def __init__(self, app: Any, ready: Any) -> None:
            self.ready = ready

        def run(self, sockets: list[socket.socket]) -> None:
            self.ready()

    monkeypatch.setattr(server, "Server", FakeServer)
    ready_args: list[str] = []
    mlxgpt.play("done", port=0, ready=lambda *args: ready_args.extend(args))
    assert urls == ["/#".join(ready_args)]
    mlxgpt.play(port=0, browser=False)
    assert len(urls) == 1
    assert cli.main(["play", "--port", "0", "--no-browser", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["page"].endswith("/#" + output["key"])
    assert output["api"].startswith("http://127.0.0.1:")


def test_missing_runs_are_reported(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["play", "--no-browser"]) == 2
    assert "there is no trained run" in capsys.readouterr().err
    assert cli.main(["play", "nobody", "--no-browser"]) == 2
    assert "there is no run named 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["taken", "-1", "99999"])
def test_unusable_port_is_reported(
    place: Path, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        number = str(occupied.getsockname()[1]) if port == "taken" else port
        assert cli.main(["play", "--no-browser", "--port", number]) == 2
    assert f"cannot listen on port {number}" in capsys.readouterr().err


def test_missing_extra_is_reported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def import_without_playground(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("mlxgpt.playground") or (name == "mlxgpt" and "playground" in str(args)):
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without_playground)
    with pytest.raises(UserError) as error:
        mlxgpt.play("done", port=0, browser=False)
    assert "needs uvicorn, which is not installed" in error.value.problem
    assert error.value.remedy == f"install it: {INSTALL_COMMAND}."


def test_run_without_a_checkpoint_is_served(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoints", "snapshots"):
        shutil.rmtree(place / "runs/done" / name)
    folders: list[Path] = []
    monkeypatch.setattr(server, "create_app", lambda folder, *_: folders.append(folder))
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    mlxgpt.play(port=0, browser=False)
    assert folders == [(place / "runs/done").absolute()]
