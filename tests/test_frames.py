"""Limit the call depth from the command line to compiled functions, so it stays easy to follow."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt.cli import main as cli
from tests.helpers.commands import ROOT, TRAIN_ARGS

PACKAGE = str(ROOT / "mlxgpt")
TRAINING, GENERATION = 9, 8  # maximum number of frames
LINE = ["generate", "to", "--run", "done", "--max-tokens", "20"]


@pytest.fixture
def call_chains(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record, for each call of a compiled function on the main thread, mlxgpt's frames from
    `cli.main` down to the caller.
    """
    recorded_chains: list[list[str]] = []
    original = mx.compile

    def recording_compile(function: Callable, **options: Any) -> Callable:
        compiled = original(function, **options)

        def call(*args: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                recorded_chains.append(frames_from_main())
            return compiled(*args)

        return call

    monkeypatch.setattr(mx, "compile", recording_compile)
    return recorded_chains


def frames_from_main() -> list[str]:
    """Return the mlxgpt functions on the stack; empty if `cli.main` is not among them."""
    names: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            names.insert(0, code.co_qualname)
            if code is cli.main.__code__:
                return names
        frame = frame.f_back  # type: ignore[assignment]
    return []


@pytest.mark.parametrize("arguments", [[], ["--samples", "2"], ["--json"]])
def test_call_depth_of_generation(
    place: Path, call_chains: list[list[str]], arguments: list[str]
) -> None:
    """Prefill, sampling and decode steps: streamed, batched, and with --json."""
    assert cli.main([*LINE, *arguments]) == 0
    assert len(call_chains) > 20
    for chain in call_chains:
        assert chain[0] == "main", "called from the command line"
        assert len(chain) <= GENERATION, chain


def test_call_depth_of_a_training_step(
    home: Path, text_file: Path, no_check: None, call_chains: list[list[str]]
) -> None:
    """Micro-batch gradients, gradient norm, and update."""
    line = [*TRAIN_ARGS, "--source", str(text_file), "--max-steps", "2"]
    assert cli.main([*line, "--gradient-accumulation-steps", "2"]) == 0
    steps = [chain for chain in call_chains if "TrainStep.__call__" in chain]
    in_training = [chain for chain in steps if "check_and_estimate" not in chain]
    assert len({chain[-1] for chain in in_training}) == 3
    for chain in in_training:
        assert chain[0] == "main", "called from the command line"
        assert len(chain) <= TRAINING, chain
