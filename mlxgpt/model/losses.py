"""Cross-entropy loss per token, DPO's loss per pair, and the compiled evaluation steps.

Shapes are fixed, so a step is traced once. Nothing here waits for the device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
from mlx.utils import tree_map

from mlxgpt.backend import ops
from mlxgpt.backend.execution import compile_function
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params

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


def training_losses(
    model: GPT, inputs: mx.array, targets: mx.array, key: mx.array | None = None
) -> mx.array:
    """Losses [B, T] of token ids [B, T], to be differentiated; with dropout if there is a key."""
    head = model.wte if model.config.tied else model.lm_head
    if flatten_params(head.trainable_parameters()):
        return token_losses(model(inputs, key=key), targets)
    x = model.run_blocks(inputs, key=key)
    return _frozen_head_losses(model, x.flatten(0, 1), targets.flatten()).reshape(targets.shape)


CHUNK_LOGITS = 1 << 24  # logits that are in memory at a time, 64 MB in float32


def _frozen_head_losses(model: GPT, x: mx.array, targets: mx.array) -> mx.array:
    """Losses [N] of the residual stream x [N, C] after the last block, with a frozen output head.

    The gradient of x is computed together with the loss, chunk by chunk, so that the logits of all
    tokens are never in memory at the same time (as in Liger Kernel, Hsu et al., 2024).
    """
    chunks = math.ceil(len(targets) * model.config.vocab_size / CHUNK_LOGITS)
    ends = [len(targets) * n // chunks for n in range(1, chunks)]

    @mx.custom_function
    def losses_and_gradient(x: mx.array) -> tuple[mx.array, mx.array]:
        losses, gradients = [], []
        for x_part, part in zip(mx.split(x, ends), mx.split(targets, ends), strict=True):
            loss, gradient = mx.vjp(
                lambda x, part=part: token_losses(model.compute_logits(x), part),
                [x_part],
                [mx.ones(part.shape)],
            )
            losses += loss
            gradients += gradient
        return mx.concatenate(losses), mx.concatenate(gradients)

    @losses_and_gradient.vjp
    def vjp(_: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        gradient = outputs[1]
        return cotangents[0][:, None].astype(gradient.dtype) * gradient

    return cast(list[mx.array], losses_and_gradient(x))[0]


def answer_logprobs(losses: mx.array, mask: mx.array) -> mx.array:
    """Log-probabilities [B] of answers, from the losses of all tokens and a mask, both [B, T]."""
    return -(losses * mask).sum(axis=-1)


def dpo_losses(logprobs: mx.array, reference: mx.array, beta: float) -> mx.array:
    """Losses [B] of pairs, in nats: −log σ of the margin between the rewards of the chosen and the
    rejected answer (Rafailov et al., Direct Preference Optimization, 2023).

    Args:
        logprobs, reference: log-probabilities of both, [B, 2], under the model and the reference.
        beta: reward per nat by which an answer became more likely.
    """
    rewards = beta * (logprobs - reference)
    return mx.logaddexp(rewards[:, 1] - rewards[:, 0], 0.0)


def make_logprob_step(model: GPT, dtype: mx.Dtype) -> Callable[..., mx.array]:
    """Compile a function (parameters, inputs, targets, mask) -> log-probabilities of the targets
    whose mask is 1, summed over each row: [B, T] -> [1, B].
    """

    def step(parameters: dict, inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        with swapped_parameters(model):
            model.update(tree_map(lambda p: p.astype(dtype), parameters))
            return answer_logprobs(token_losses(model(inputs), targets), mask)[None]

    return compile_function(step)


def make_kl_step(model: GPT, dtype: mx.Dtype) -> Callable[..., mx.array]:
    """Compile a function (parameters, reference parameters, inputs, targets, mask) -> [2, B]: the
    log-probabilities of `make_logprob_step`, and the KL divergence of the model's next-token
    distributions from the reference's, in nats, summed over the same targets.
    """

    def step(
        parameters: dict, reference: dict, inputs: mx.array, targets: mx.array, mask: mx.array
    ) -> mx.array:
        logits = []
        with swapped_parameters(model):
            for weights in (parameters, reference):
                model.update(tree_map(lambda p: p.astype(dtype), weights))
                logits.append(model(inputs).astype(mx.float32))
        log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in logits)
        divergence = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        logprobs = answer_logprobs(token_losses(logits[0], targets), mask)
        return mx.stack([logprobs, (divergence * mask).sum(axis=-1)])

    return compile_function(step)


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
