from __future__ import annotations

import signal
import sys
import time
import weakref

import pytest

from mlxgpt.cli.interrupts import redeliver_interrupt


def test_an_interrupt_in_a_callback_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints exceptions of weak references' callbacks, and continues."""

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    def drop_referenced_object() -> None:
        target = set_class()
        reference = weakref.ref(target, interrupt)
        del target
        assert reference() is None
        time.sleep(10)

    set_class = type("Target", (set,), {})
    monkeypatch.setattr(sys, "unraisablehook", redeliver_interrupt)
    old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            drop_referenced_object()
    finally:
        signal.signal(signal.SIGINT, old_handler)
    assert capsys.readouterr().err == ""
