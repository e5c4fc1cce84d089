from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from mlxgpt.backend.cpu import blas
from mlxgpt.backend.cpu import parallel as lanes
from mlxgpt.backend.cpu.parallel import Lanes

pytestmark = pytest.mark.skipif(lanes.count() == 1, reason="a matter of the CPU")


def test_two_shares_are_computed_by_two_threads_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)  # passed only if both are there

    def add_one(x: mx.array) -> tuple[mx.array, str]:
        both.wait()
        return x + 1, threading.current_thread().name

    results = Lanes(lambda: mx.compile(add_one))([(mx.array(1) * 2,), (mx.array(2) * 2,)])
    assert [value.item() for value, _ in results] == [3, 5]
    assert results[0][1] != results[1][1]


def test_each_lane_has_half_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    @contextmanager
    def shared_by(threads: int) -> Iterator[None]:
        asked.append(threads)
        yield

    monkeypatch.setattr(blas, "shared_by", shared_by)
    Lanes(lambda: lambda x: x + 1)([(mx.array(1),), (mx.array(2),)])
    assert asked == [2]


def test_one_share_is_computed_here() -> None:
    run = Lanes(lambda: lambda x: (x, threading.current_thread()))
    assert run([(1,)]) == [(1, threading.current_thread())]


@pytest.mark.parametrize(
    ("sequences", "length", "expected"),
    [
        (16, 128, 1),  # Tier 1: 1,024 tokens in each half
        (16, 256, 2),
        (32, 256, 4),
        (12, 256, 2),  # halves of 6: in two threes, which are few enough
        (20, 256, 5),  # of 10: two fives are too many
        (4, 2048, 2),  # one sequence is the least
        (2, 2048, 1),
        (15, 256, 1),  # there are no halves
    ],
)
def test_portions_are_as_few_as_are_small_enough(
    sequences: int, length: int, expected: int
) -> None:
    assert lanes.portions(sequences, length) == expected


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_either_lane_is_raised(broken: int) -> None:
    def fail(x: int) -> mx.array:
        if x == broken:
            raise ValueError(f"lane {x}")
        return mx.array(x)

    run = Lanes(lambda: fail)
    with pytest.raises(ValueError, match=f"lane {broken}"):
        run([(0,), (1,)])
    assert [value.item() for value in run([(2,), (3,)])] == [2, 3]


def test_the_process_ends_as_it_should() -> None:
    """MLX aborts when a thread that has computed does not clear its streams; not every time."""
    code = (
        "import mlxgpt, mlx.core as mx; from mlxgpt.backend.cpu.parallel import Lanes; "
        "run = Lanes(lambda: mx.compile(lambda a: (a @ a).sum())); "
        "print([r.item() for r in run([(mx.ones((8, 8)),)] * 2)])"
    )
    for _ in range(5):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "[512.0, 512.0]\n", "")
