"""How functions run on this device: compiled, and on a CPU on its threads. On a GPU the rest does
nothing.
"""

from __future__ import annotations

import mlx.core as mx

from mlxgpt.backend.cpu import blas, jit
from mlxgpt.backend.cpu.blas import shared_by as shared_by
from mlxgpt.backend.cpu.jit import compiled as compiled
from mlxgpt.backend.cpu.parallel import Lanes as PerThread
from mlxgpt.backend.cpu.parallel import count as thread_count
from mlxgpt.backend.cpu.parallel import portions as portions
from mlxgpt.machine import device

disable_compilation_after = jit.disable_after_failure
shield_from_sigint = jit.undisturbed

Lanes = PerThread


def slow_reasons() -> list[str]:
    """Why computing here is slower than it could be, one line each; [] if it is not."""
    reasons = [] if blas.is_fast() or not device.on_cpu() else [blas.status()]
    return [*reasons, *filter(None, [jit.status()])]


def shard(
    inputs: mx.array, targets: mx.array, key: mx.array
) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Divide a batch among the threads that compute it: for each one (inputs, targets, keys), with
    one part after the other along the first axis. A GPU has one thread, whose parts are the
    micro-batches. A CPU has two, each with half of every micro-batch in portions, or with half of
    the micro-batches if their rows are odd in number.

    Args:
        inputs, targets: ids[A, B, T].
        key: for dropout; each part gets its own from it.
    """
    A, B, T = inputs.shape
    L = thread_count()
    if B % L == 0 and L > 1:
        P = portions(B, T)
        inputs, targets = (
            ids.reshape(A, L, P, B // L // P, T).swapaxes(0, 1).flatten(1, 2)
            for ids in (inputs, targets)
        )
    else:
        L = L if A % L == 0 else 1
        inputs, targets = (ids.reshape(L, A // L, B, T) for ids in (inputs, targets))
    keys = mx.random.split(key, L * inputs.shape[1]).reshape(L, inputs.shape[1], -1)
    return list(zip(inputs, targets, keys, strict=True))


def compile_problem() -> str | None:
    """Why nothing is compiled here, in one line; None if it is."""
    return jit.status()


def matmul_library() -> str:
    """What computes matrix products here."""
    return blas.status() if device.on_cpu() else "MLX's own kernels"
