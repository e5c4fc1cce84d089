from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import pytest

from mlxgpt.backend.cpu import blas, parallel
from mlxgpt.backend.device import on_cpu
from mlxgpt.backend.execution import PerThreadFunction

pytestmark = pytest.mark.skipif(not on_cpu(), reason="for the CPU")


def call_on_threads(functions: list[Callable], calls: Sequence[tuple]) -> list:
    """The results of two functions, each on a thread of its own."""
    return PerThreadFunction(iter(functions).__next__)(calls)


def test_two_threads_compute_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=30)  # passed only if both are there

    def add_one(x: mx.array) -> tuple[mx.array, str]:
        barrier.wait()
        return x + 1, threading.current_thread().name

    arguments = (mx.array(1) * 2,), (mx.array(2) * 2,)
    results = call_on_threads([mx.compile(add_one), mx.compile(add_one)], arguments)
    assert [value.item() for value, _ in results] == [3, 5]
    assert results[0][1] == threading.current_thread().name != results[1][1]


def test_a_function_is_always_called_on_the_same_thread() -> None:
    """A compiled function belongs to the thread that traced it."""

    def thread(x: mx.array) -> threading.Thread:
        return threading.current_thread()

    arguments = (mx.array(1),), (mx.array(2),)
    assert call_on_threads([thread, thread], arguments) == call_on_threads(
        [thread, thread], arguments
    )


def test_each_thread_has_half_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    @contextmanager
    def share_threads(count: int) -> Iterator[None]:
        counts.append(count)
        yield

    monkeypatch.setattr(blas, "share_blas_threads", share_threads)
    call_on_threads([mx.abs, mx.abs], ((mx.array(1),), (mx.array(2),)))
    assert counts == [2]


@pytest.mark.parametrize(
    ("rows", "length", "expected"),
    [
        (16, 128, 1),  # Tier 1: 1,024 tokens in each half
        (16, 256, 2),
        (32, 256, 4),
        (12, 256, 2),  # halves of 6: in two threes, which are few enough
        (20, 256, 5),  # of 10: two fives are too many
        (4, 2048, 2),  # one row is the least
        (2, 2048, 1),
        (15, 256, 1),  # there are no halves
    ],
)
def test_portions_are_as_few_as_are_small_enough(rows: int, length: int, expected: int) -> None:
    assert parallel.cpu_chunks_per_thread(rows, length) == expected


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_either_thread_is_raised(broken: int) -> None:
    def fail(x: int) -> mx.array:
        if x == broken:
            raise ValueError(f"call {x}")
        return mx.array(x)

    with pytest.raises(ValueError, match=f"call {broken}"):
        call_on_threads([fail, fail], ((0,), (1,)))
    assert [value.item() for value in call_on_threads([fail, fail], ((2,), (3,)))] == [2, 3]


def test_the_process_ends_as_it_should() -> None:
    """MLX aborts when a thread that has computed does not clear its streams; not every time."""
    code = (
        "import mlxgpt, mlx.core as mx; from mlxgpt.backend.execution import PerThreadFunction; "
        "run = PerThreadFunction(lambda: mx.compile(lambda a: (a @ a).sum())); "
        "print([r.item() for r in run([(mx.ones((8, 8)),)] * 2)])"
    )
    for _ in range(5):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "[512.0, 512.0]\n", "")
