"""How functions are executed on this device: compiled and, on a CPU, on two threads.

On a GPU there is one thread, nothing is split, and BLAS is not used: the functions for the CPU then
do nothing.
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
    """`mx.compile` of a function, where this machine can compile; otherwise MLX executes it one
    operation after another. Options are those of `mx.compile`.
    """
    compile_failure()  # before MLX makes its first kernel
    return mx.compile(function, **options)


def compile_failure() -> str | None:
    """One line on why MLX compiles no kernels here; None if it does."""
    if _compile_failure is None and device.on_cpu() and (problem := jit.compiler_problem()):
        _disable_compilation(problem)
    return _compile_failure


def disable_compilation_on_error(error: RuntimeError) -> str | None:
    """Disable compilation if an error says that MLX could not compile one of its kernels. The
    computation can then be started over.

    Returns:
        One line for the user; None for any other error, or if compilation was disabled before.
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
    """One line for each reason why computing is slower on this machine than it could be."""
    reasons = [blas.blas_status()] if device.on_cpu() and not blas.has_fast_blas() else []
    failure = compile_failure()
    return [*reasons, failure] if failure else reasons


def thread_count() -> int:
    """Number of threads that compute a batch together: 2 on a CPU, 1 on a GPU."""
    return parallel.THREADS if device.on_cpu() else 1


def chunks_per_thread(rows: int, length: int) -> int:
    """Number of equal chunks in which each thread computes its share of a batch, one after the
    other, to save memory; 1 on a GPU.

    Args:
        rows: sequences of the whole batch, over all threads.
        length: tokens of each.
    """
    return parallel.cpu_chunks_per_thread(rows, length) if device.on_cpu() else 1


class PerThreadFunction(Generic[ResultT]):
    """One function for each of the `thread_count()` threads, called at the same time.

    Args:
        make_function: makes the function, called once for each thread; a compiled function belongs
            to the thread that traced it.
    """

    def __init__(self, make_function: Callable[[], Callable[..., ResultT]]) -> None:
        self._functions = [make_function() for _ in range(thread_count())]

    def __call__(self, arguments: Iterable[tuple]) -> list[ResultT]:
        """Call the functions, each with one tuple of arguments.

        Args:
            arguments: one tuple for each thread. With a single tuple, or on a GPU, all calls are
                made on this thread, one after another.

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


def shard_batch(
    inputs: mx.array, targets: mx.array, key: mx.array
) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Divide a batch among the threads that compute it: for each one (inputs, targets, keys), with
    one part after the other along the first axis. A GPU has one thread, whose parts are the
    micro-batches. A CPU has two, each with half of every micro-batch in chunks, or with half of
    the micro-batches if their rows are odd in number.

    Args:
        inputs, targets: ids[A, B, T].
        key: for dropout; each part gets its own from it.
    """
    A, B, T = inputs.shape
    threads = thread_count()
    if B % threads == 0 and threads > 1:
        chunks = chunks_per_thread(B, T)
        inputs, targets = (
            ids.reshape(A, threads, chunks, B // threads // chunks, T).swapaxes(0, 1).flatten(1, 2)
            for ids in (inputs, targets)
        )
    else:
        threads = threads if A % threads == 0 else 1
        inputs, targets = (ids.reshape(threads, A // threads, B, T) for ids in (inputs, targets))
    keys = mx.random.split(key, threads * inputs.shape[1]).reshape(threads, inputs.shape[1], -1)
    return list(zip(inputs, targets, keys, strict=True))
