from __future__ import annotations

import os
import pwd
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxgpt.utils.redact import redact


@pytest.fixture(autouse=True)
def jane(monkeypatch: pytest.MonkeyPatch) -> None:
    account = SimpleNamespace(pw_name="janedoe", pw_dir="/Users/janedoe")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)
    monkeypatch.setattr(socket, "gethostname", lambda: "Tower-of-Jane.fritz.box")
    monkeypatch.setenv("HOME", "/Users/janedoe")
    monkeypatch.setenv("LOGNAME", "jdoe")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/Users/janedoe/x", "HOME/x"),
        (f"{tempfile.gettempdir()}/of-JaneDoe", "TEMP/of-USER"),
        ("/my/checkout/y", "CHECKOUT/y"),
        ("tower-of-jane.fritz.box, tower-of-jane", "HOST, HOST"),
        ("janedoe1 jdoe", "USER1 USER"),
        ("janedoes, root and user", "janedoes, root and user"),
    ],
)
def test_private_names_are_replaced(text: str, expected: str) -> None:
    assert redact(text, {"CHECKOUT": Path("/my/checkout")}) == expected


def test_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", fail)
    assert redact(f"user {os.getuid()}", {}) == f"user {os.getuid()}"
