"""Cross-entropy loss per token, and the compiled evaluation step.

Shapes are fixed, so the step is traced once. Nothing here waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_map

from mlxgpt.backend import ops
from mlxgpt.backend.execution import compile_function
from mlxgpt.model.gpt import GPT

_trace_lock = threading.Lock()


@contextmanager
def swapped_parameters(model: GPT) -> Iterator[None]:
    """Restore the model's parameters after a function was traced with other ones. A lock allows one
    trace at a time.
    """
    with _trace_lock:
        original = model.parameters()
        try:
            yield
        finally:
            model.update(original)


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy in nats, in float32: logits [B, T, V], targets [B, T] (below V) -> [B, T]."""
    return ops.cross_entropy(logits.astype(mx.float32), targets)


def make_eval_step(model: GPT, dtype: mx.Dtype) -> Callable[..., mx.array]:
    """Compile a function (parameters, inputs [B, T], targets [B, T], mask [B, T]) -> summed loss in
    nats of the tokens whose mask is 1.
    """

    def eval_step(
        parameters: dict, inputs: mx.array, targets: mx.array, mask: mx.array
    ) -> mx.array:
        with swapped_parameters(model):
            model.update(tree_map(lambda p: p.astype(dtype), parameters))
            return (token_losses(model(inputs), targets) * mask).sum()

    return compile_function(eval_step)
