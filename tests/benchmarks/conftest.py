from __future__ import annotations

import pwd
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest


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
