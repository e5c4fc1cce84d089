"""Execute functions on this device: compiled and, on a CPU, on two threads.

On a GPU there is one thread, batches are not split, and the functions for the CPU do nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import mlx.core as mx

from mlxgpt.backend import device, device_errors
from mlxgpt.backend.cpu import blas, jit, parallel
from mlxgpt.backend.cpu.blas import blas_status, blas_thread_count, share_blas_threads
from mlxgpt.backend.cpu.jit import shield_from_sigint
from mlxgpt.data.token_array import Batch

__all__ = [
    "PerThreadFunction",
    "blas_status",
    "blas_thread_count",
    "chunks_per_thread",
    "compile_failure",
    "compile_function",
    "disable_compilation_on_error",
    "shard_batch",
    "share_blas_threads",
    "shield_from_sigint",
    "slow_reasons",
    "thread_count",
]

ResultT = TypeVar("ResultT")

_compile_failure: str | None = None


def compile_function(function: Callable, **options: Any) -> Callable:
    """`mx.compile` a function; without a working compiler, MLX executes it one operation at a time.
    Options are those of `mx.compile`.
    """
    compile_failure()  # disables compilation if needed, before MLX compiles its first kernel
    return mx.compile(function, **options)


def compile_failure() -> str | None:
    """Why MLX cannot compile kernels on this machine, in one line; None if it can."""
    if _compile_failure is None and device.on_cpu() and (problem := jit.compiler_problem()):
        _disable_compilation(problem)
    return _compile_failure


def disable_compilation_on_error(error: RuntimeError) -> str | None:
    """Disable compilation if an error says that MLX could not compile a kernel. The computation can
    then be retried.

    Returns:
        One line for the user; None for any other error, or if compilation was already disabled.
    """
    if _compile_failure or not device_errors.is_compile_failure(error):
        return None
    if device_errors.CPU_COMPILE_FAILURE in str(error):
        return _disable_compilation(jit.describe_failure(jit.KERNEL_FAILED))
    first_line, *other_lines = str(error).strip().splitlines()
    reason = " ".join([first_line, *other_lines[:1]])[:300]
    return _disable_compilation(
        f"Metal failed to compile a kernel ({reason}): kernel fusion is off, which is slower"
    )


def _disable_compilation(failure: str) -> str:
    global _compile_failure
    mx.disable_compile()
    _compile_failure = failure
    return failure


def slow_reasons() -> list[str]:
    """Reasons why this machine computes slower than it could, one line each."""
    reasons = [blas.blas_status()] if device.on_cpu() and not blas.has_fast_blas() else []
    failure = compile_failure()
    return [*reasons, failure] if failure else reasons


def thread_count() -> int:
    """Number of threads that share a batch: 2 on a CPU, 1 on a GPU."""
    return parallel.THREADS if device.on_cpu() else 1


def chunks_per_thread(rows: int, length: int) -> int:
    """Number of equal chunks into which each thread splits its share of a batch, to save memory; 1
    on a GPU.

    Args:
        rows: sequences in the whole batch, over all threads.
        length: tokens per sequence.
    """
    return parallel.cpu_chunks_per_thread(rows, length) if device.on_cpu() else 1


class PerThreadFunction(Generic[ResultT]):
    """A function for each of the `thread_count()` threads, called in parallel.

    Args:
        make_function: creates the function; called once per thread, since a compiled function
            belongs to the thread that traced it.
    """

    def __init__(self, make_function: Callable[[], Callable[..., ResultT]]) -> None:
        self._functions = [make_function() for _ in range(thread_count())]

    def __call__(self, arguments: Iterable[tuple]) -> list[ResultT]:
        """Call each function with one tuple of arguments.

        Args:
            arguments: one tuple per thread. With a single tuple, or on a GPU, this thread makes all
                calls, one after another.

        Returns:
            The results in order; evaluated if two threads computed them.
        """
        calls = list(arguments)
        if len(self._functions) == 1 or len(calls) == 1:
            return list(itertools.starmap(self._functions[0], calls))
        with parallel.run_on_second_thread(self._functions[1], calls) as second:
            first = self._functions[0](*calls[0])
            mx.eval(first)
            return [first, second.result()]


def shard_batch(batch: Batch, key: mx.array) -> list[list[tuple[Batch, mx.array]]]:
    """Split a batch among the threads: each thread's parts, with a dropout key for each. On a GPU,
    there is one thread, and the parts are the micro-batches. On a CPU, each of two threads gets
    half of every micro-batch, in chunks, or half of the micro-batches if B is odd.

    Args:
        batch: of shape [A, B, T]: A micro-batches.
        key: random key for dropout, split into one key per part.
    """
    A, B, T = batch.inputs.shape
    threads, chunks = thread_count(), 0
    if B % threads == 0 and threads > 1:
        chunks = chunks_per_thread(B, T)
    elif A % threads:
        threads = 1

    def split(array: mx.array) -> mx.array:  # [A, B, T] -> [threads, parts, rows, T]
        if not chunks:
            return array.reshape(threads, A // threads, B, -1)
        array = array.reshape(A, threads, chunks, B // threads // chunks, -1)
        return array.swapaxes(0, 1).flatten(1, 2)

    arrays = [None if array is None else split(array) for array in batch]
    parts = A * chunks or A // threads
    keys = mx.random.split(key, threads * parts).reshape(threads, parts, -1)
    return [
        [
            (Batch(*(None if array is None else array[thread, n] for array in arrays)), key)
            for n, key in enumerate(keys[thread])
        ]
        for thread in range(threads)
    ]
