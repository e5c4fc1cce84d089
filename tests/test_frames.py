"""How many functions of mlxgpt are on the stack, from the command line to what MLX compiled."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxgpt import cli
from tests.commands import ROOT, TRAIN

PACKAGE = str(ROOT / "mlxgpt")
MAIN = (f"{PACKAGE}/cli.py", "main")


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """For each call of a compiled function on the main thread: its name, and mlxgpt's functions on
    the stack, from `cli.main` on.
    """
    found: list[tuple[str, list[str]]] = []
    real = mx.compile

    def compile(function: Callable, *args: Any, **options: Any) -> Callable:
        compiled = real(function, *args, **options)
        name = getattr(function, "func", function).__qualname__

        def call(*values: Any, **named: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                frames = inspect.stack(0)[::-1]
                ours = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
                names = [(f.filename, f.function) for f in ours]
                if MAIN in names:
                    found.append((name, [name for _, name in names[names.index(MAIN) :]]))
            return compiled(*values, **named)

        return call

    monkeypatch.setattr(mx, "compile", compile)
    return found


def deepest(stacks: list[tuple[str, list[str]]], name: str) -> list[str]:
    return max((stack for found, stack in stacks if found.endswith(name)), key=len)


def test_few_functions_lead_to_the_compiled_step(
    home: Path, text_file: Path, no_check: None, stacks: list[tuple[str, list[str]]]
) -> None:
    assert cli.main([*TRAIN, "--source", str(text_file), "--max-steps", "2"]) == 0
    for name in ("_add_gradients", "_clipped_norm", "OptimizerGroups.update"):
        steps = [(n, stack) for n, stack in stacks if "retry_on_gpu_failure" in stack[:4]]
        assert len(deepest([s for s in steps if "train" in s[1]], name)) <= 9


def test_few_functions_lead_to_a_sampled_id(
    place: Path, stacks: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--samples", "3"]):
        stacks.clear()
        assert cli.main(["generate", "", "--max-tokens", "5", "--seed", "1", *arguments]) == 0
        assert 0 < max(len(stack) for _, stack in stacks) <= 8
    capsys.readouterr()
