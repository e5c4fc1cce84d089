from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxgpt.backend import device, execution
from mlxgpt.backend.cpu import blas, jit, parallel
from mlxgpt.backend.execution import PerThreadFunction, slow_reasons
from mlxgpt.data.token_array import Batch

CPU_COMPILE_ERROR = "[Compile::eval_cpu] Failed to compile function Exp with error code 256."
METAL_COMPILE_ERROR = (
    "[metal::Device] Unable to build metal library from source\nprogram_source:9: error\nmore"
)


@pytest.fixture
def disable_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has one entry per call of `mx.disable_compile`, which has no effect here."""
    calls: list[bool] = []
    monkeypatch.setattr(execution, "_compile_failure", None)
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append(True))
    return calls


def set_device(monkeypatch: pytest.MonkeyPatch, *, cpu: bool) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: cpu)


@pytest.mark.parametrize(("cpu", "count"), [(True, 2), (False, 1)])
def test_each_thread_has_its_own_function(
    cpu: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_device(monkeypatch, cpu=cpu)
    indices: list[int] = []

    def make_function() -> Callable[[int], tuple[int, int, str]]:
        indices.append(len(indices))
        index = indices[-1]
        return lambda x: (index, x, threading.current_thread().name)

    run = PerThreadFunction(make_function)
    assert indices == list(range(count)) == list(range(execution.thread_count()))
    results = run((x,) for x in (7, 8))
    assert [result[:2] for result in results] == [(0, 7), (count - 1, 8)]
    assert len({result[2] for result in results}) == count


def test_single_call_runs_on_the_current_thread() -> None:
    run = PerThreadFunction(lambda: lambda x: (x, threading.current_thread()))
    assert run([(1,)]) == [(1, threading.current_thread())]


def test_only_the_cpu_uses_several_chunks_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, expected in ((True, 4), (False, 1)):
        set_device(monkeypatch, cpu=cpu)
        assert execution.chunks_per_thread(32, 256) == expected


def test_failing_compiler_disables_compilation_once(
    disable_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_device(monkeypatch, cpu=True)
    monkeypatch.setattr(jit, "compiler_problem", lambda: "no compiler")
    execution.compile_function(mx.abs)
    assert disable_calls == [True]
    assert execution.compile_failure() == "no compiler"
    assert disable_calls == [True]


def test_gpu_needs_no_compiler(disable_calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    set_device(monkeypatch, cpu=False)
    monkeypatch.setattr(jit, "compiler_problem", lambda: "no compiler")
    assert execution.compile_failure() is None
    assert slow_reasons() == []
    assert disable_calls == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            CPU_COMPILE_ERROR,
            "the C++ compiler failed (it cannot compile MLX's kernels): kernel fusion is off",
        ),
        (
            METAL_COMPILE_ERROR,
            "Metal failed to compile a kernel ([metal::Device] Unable to build metal library from "
            "source program_source:9: error): kernel fusion is off, which is slower",
        ),
    ],
    ids=["g++", "Metal"],
)
def test_compilation_is_disabled_once_after_a_kernel_failed(
    error: str, line: str, disable_calls: list[bool]
) -> None:
    reason = execution.disable_compilation_on_error(RuntimeError(error))
    assert (reason or "").startswith(line)
    assert execution.compile_failure() == reason
    assert execution.disable_compilation_on_error(RuntimeError(error)) is None
    assert disable_calls == [True]


def test_other_errors_do_not_disable_compilation(disable_calls: list[bool]) -> None:
    assert execution.disable_compilation_on_error(RuntimeError("something else")) is None
    assert disable_calls == []


@pytest.fixture
def slow_cpu(disable_calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_fast", False)
    monkeypatch.setattr(blas, "_status", "reference BLAS (slow)")
    monkeypatch.setattr(jit, "compiler_problem", lambda: "no compiler")


def test_cpu_has_two_slow_reasons(slow_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_device(monkeypatch, cpu=True)
    assert slow_reasons() == ["reference BLAS (slow)", "no compiler"]


def test_gpu_has_one_slow_reason(slow_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_device(monkeypatch, cpu=False)
    assert slow_reasons() == []
    line = execution.disable_compilation_on_error(RuntimeError(METAL_COMPILE_ERROR))
    assert slow_reasons() == [line]


@pytest.mark.parametrize("threads", [1, 2])
@given(A=st.integers(1, 4), B=st.integers(1, 12), T=st.integers(1, 6), portion=st.integers(2, 30))
def test_shards_cover_the_whole_batch(threads: int, A: int, B: int, T: int, portion: int) -> None:
    """Every row is in exactly one part; parts have equal sizes and different random keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "MAX_CHUNK_TOKENS", portion)
        patch.setattr(device, "on_cpu", lambda: threads == 2)
        rows = np.arange(A * B)
        ids = mx.array(np.broadcast_to(rows.reshape(A, B, 1), (A, B, T)))
        shards = execution.shard_batch(Batch(ids, -ids, 2 * ids), mx.random.key(1))
        assert len(shards) <= threads
        assert len({len(shard) for shard in shards}) == 1
        parts = [part for shard in shards for part in shard]
        assert len({batch.inputs.shape for batch, _ in parts}) == 1
        shard_rows = [int(row) for batch, _ in parts for row in np.array(batch.inputs[:, 0])]
        assert sorted(shard_rows) == rows.tolist()
        assert all((batch.inputs == -batch.targets).all() for batch, _ in parts)
        assert all((2 * batch.inputs == batch.weights).all() for batch, _ in parts)
        keys = {str(key.tolist()) for _, key in parts}
        assert len(keys) == len(parts)
        if threads == 1:
            assert len(parts) == A, "a GPU takes whole micro-batches"
