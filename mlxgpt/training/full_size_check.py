"""Self-checks at full model size: initial loss, one training step, and the device's results against
reference computations. Inputs are random with fixed seeds.

A GPU uses different kernels for a model's real shapes: attention with head sizes 64 or 128, fused
without a gradient and unfused with one, another one for a single token, and matrix products that
round float32 to TF32. The small models of selfcheck.py reach none of them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlxgpt.backend import device
from mlxgpt.config import Config, ModelConfig, override_config
from mlxgpt.data.token_array import Batch
from mlxgpt.model.gpt import GPT
from mlxgpt.model.init_weights import INIT_STD
from mlxgpt.model.kv_cache import KVCache, pad_cache
from mlxgpt.model.losses import make_eval_step, swapped_parameters, token_losses
from mlxgpt.model.parameters import flatten_params
from mlxgpt.model.stats import mlp_width
from mlxgpt.training.step import TrainStep, make_train_step
from mlxgpt.utils.seeds import derive_seed


@dataclass(frozen=True)
class CheckResult:
    """Result of one self-check.

    Attributes:
        name: name of the check.
        ok: whether it passed; None if it only reports and cannot fail.
        detail: the measured values.
        why: explanation of the check; may be empty.
    """

    name: str
    ok: bool | None
    detail: str
    why: str = ""


INITIAL_LOSS_EXPLANATION = (
    "Why ln V: an untrained model should assign each of the V tokens about the same probability, "
    "1/V, which gives a cross-entropy loss of -ln(1/V) = ln V nats. GPT-2's initialization comes "
    "close. A logit is the dot product of a normalized hidden state, of norm √n_embd, and a row of "
    "the output head, whose weights have a standard deviation of 0.02. The logits therefore have a "
    "standard deviation of only 0.02·√n_embd, and the softmax is nearly uniform; this adds half "
    "their variance, 0.0002·n_embd nats, to the loss. With a tied output head, the logit of the "
    "input token is also higher, by about 1 in a wide model. The effect is negligible with "
    "thousands of tokens, and a few tenths of a nat with a small vocabulary. An initial loss far "
    "above the expected value means that the initial weights are too large; one below it means "
    "that the model can see its targets (a broken causal mask)."
)


def check_initial_loss(config: Config) -> CheckResult:
    """Check that an untrained model at full size has the loss expected for its initial weights.

    The targets are random, so the loss must match the mean over all possible targets within the
    sampling noise; a model that sees its targets is off by much more. That mean must also be near
    its expected value, within the variation of the head's V random rows.
    """
    c, ln_v = config.model, math.log(config.model.vocab_size)
    ids = random_ids(config, 8, min(c.block_size, 128) + 1)
    model = GPT(c, config.train.seed)
    logits = model(ids[:, :-1]).astype(mx.float32)  # [B, T, V]
    loss = float(token_losses(logits, ids[:, 1:]).mean())
    mean_target_loss = float((mx.logsumexp(logits, axis=-1) - logits.mean(axis=-1)).mean())
    noise = math.sqrt(float(logits.var(axis=-1).mean()) / ids[:, 1:].size)
    head = model.wte.weight if c.tied else model.lm_head.weight
    excess, std = _expected_loss_excess(c), math.sqrt(float(mx.square(head).mean()))
    ok = (
        abs(loss - mean_target_loss) <= 6 * noise + 1e-4
        and mean_target_loss - ln_v <= (2 + 12 / math.sqrt(c.vocab_size)) * excess + 1e-4
        and std <= 3 * INIT_STD
    )
    detail = (
        f"{loss:.3f} nats; ln {c.vocab_size:,} = {ln_v:.3f}, expected about {ln_v + excess:.3f}"
    )
    return CheckResult("initial loss", ok, detail, INITIAL_LOSS_EXPLANATION)


def _expected_loss_excess(c: ModelConfig) -> float:
    """Expected initial loss minus ln V, in nats: to first order in the variance of the logits, but
    exact for the raised logit of the input token with a tied head.
    """
    variance = INIT_STD**2 * c.n_embd  # of a logit
    excess = variance / 2 * (1 - 1 / c.vocab_size)
    if c.tied:
        # Variance of the residual stream: token embedding, position embedding and MLPs.
        token_variance = 1.0 if c.embedding_norm else INIT_STD**2
        position_variance = INIT_STD**2 if c.position == "learned" else 0.0
        mlp_variance = INIT_STD**2 / 2 * mlp_width(c) * variance / 4
        residual_variance = token_variance + position_variance + mlp_variance
        self_logit = INIT_STD * c.n_embd * math.sqrt(token_variance / residual_variance)
        excess += math.log1p(math.expm1(self_logit) / c.vocab_size) - self_logit / c.vocab_size
    return excess


def check_full_size_step(config: Config) -> CheckResult:
    """Check that a full-size step on one sequence has finite loss, gradient and parameters."""
    config = override_config(config, {"batch_size": 1, "gradient_accumulation_steps": 1})
    step_function = make_train_step(config)
    loss, norm = take_step(step_function, config, 0)
    parameters = flatten_params(step_function.model.trainable_parameters())
    finite = all(bool(mx.isfinite(p).all()) for p in parameters.values())
    ok = finite and math.isfinite(loss) and math.isfinite(norm)
    detail = f"loss {loss:.3f}, gradient norm {norm:.2f}"
    return CheckResult(
        "full-size training step", ok, f"{detail}, all finite" if ok else f"{detail}, not finite"
    )


def check_against_cpu(config: Config) -> CheckResult:
    """Check the training step's loss and gradient of one sequence, on this device and in its dtype,
    against the same weights on the CPU, in float32 and uncompiled.
    """
    model, loss, gradient, x, y = _compute_loss_and_gradient(config)
    parameters = model.trainable_parameters()

    def mean_loss(parameters: dict) -> mx.array:
        model.update(parameters)
        return token_losses(model(x), y).mean()

    with use_cpu(), swapped_parameters(model):
        cpu_loss, cpu_gradient = mx.value_and_grad(mean_loss)(parameters)
        mx.eval(cpu_loss, cpu_gradient)
    tolerance = rounding_tolerance(config.model, config.train.dtype)
    gradient_distance = relative_distance(gradient, cpu_gradient)
    loss_error = abs(loss - float(cpu_loss))
    return CheckResult(
        "GPU matches CPU",
        gradient_distance <= tolerance and loss_error <= loss_tolerance(config, loss, y.size),
        f"loss {loss:.5f}, on the CPU {float(cpu_loss):.5f}; gradients "
        f"differ by {gradient_distance:.1e} (tolerance {tolerance:.1e})",
    )


def check_evaluation_loss(config: Config) -> CheckResult:
    """Check that the evaluation step gives the same loss as the training step: without a gradient
    MLX uses other kernels.
    """
    model, train_loss, _, x, y = _compute_loss_and_gradient(config)
    eval_step = make_eval_step(model, getattr(mx, config.train.dtype))
    eval_loss = float(eval_step(model.parameters(), x, y, mx.ones(y.shape))) / y.size
    tolerance = loss_tolerance(config, train_loss, y.size)
    return CheckResult(
        "evaluation matches training",
        abs(eval_loss - train_loss) <= tolerance,
        f"evaluation loss {eval_loss:.5f}, training loss {train_loss:.5f} "
        f"(tolerance {tolerance:.1e})",
    )


DECODED_TOKENS = 8  # decoded one at a time after the prompt


def check_cached_logits(config: Config) -> CheckResult:
    """Check that decoding token by token with the KV cache gives the logits of a full forward pass,
    with all sequences at the same position and with different ones. In float32, as in generation.
    """
    block_size = config.model.block_size
    model, ids = make_scaled_model(config), random_ids(config, 2, block_size)
    uncached_logits = model(ids)
    prompt_length = max(1, block_size // 2)
    end = min(prompt_length + DECODED_TOKENS, block_size)
    max_distance = 0.0
    for lengths in ([prompt_length], [prompt_length, max(1, prompt_length - 1)]):
        position, cache = mx.array(lengths), KVCache()
        logits = model(ids[:, :prompt_length], cache, last=position - 1)
        layers = pad_cache(cache.layers, block_size)
        for n in range(end - prompt_length + 1):
            row_positions = mx.broadcast_to(position, (2,))[:, None]
            last_positions = row_positions[..., None] - 1
            expected = mx.take_along_axis(uncached_logits, last_positions, axis=1)[:, 0]
            max_distance = max(max_distance, relative_distance(logits, expected))
            if n < end - prompt_length:
                cache = KVCache(layers, position, kv_length=end)
                logits = model(mx.take_along_axis(ids, row_positions, axis=1), cache)[:, 0]
                layers, position = cache.layers, position + 1
    tolerance = rounding_tolerance(config.model, "float32")
    return CheckResult(
        "KV cache matches full pass",
        max_distance <= tolerance,
        f"logits differ by at most {max_distance:.1e} (tolerance {tolerance:.1e})",
    )


ROUNDING_MARGIN = 3  # allowed multiple of the estimated rounding error


def rounding_tolerance(config: ModelConfig, dtype: str) -> float:
    """Largest relative error of logits or gradients that rounding can explain.

    The relative error of a matrix product is the unit roundoff of its inputs: 2^-8 for bfloat16,
    2^-11 for TF32. In full float32 the sums dominate: √n · 2^-24 for n terms (Higham & Mary, 2019),
    with n the longest sum in the model. Each layer has six products, the head one more, and
    independent errors grow with the square root of their number. Measured on the CPU, with TF32
    emulated: 0.05 to 1.2 times this estimate, at both tiers and with two layers; a wrong scale,
    mask or position gives an error of 0.05 to 0.9. `ROUNDING_MARGIN` times the estimate is allowed.
    """
    if dtype == "bfloat16":
        unit_roundoff = 2.0**-8
    elif not device.has_full_precision_matmul():
        unit_roundoff = 2.0**-11
    else:
        max_terms = max(config.vocab_size, mlp_width(config), config.block_size)
        unit_roundoff = math.sqrt(max_terms) * 2.0**-24
    return ROUNDING_MARGIN * unit_roundoff * math.sqrt(6 * config.n_layer + 1)


def loss_tolerance(config: Config, loss: float, tokens: int) -> float:
    """Largest error of the mean loss over `tokens` tokens that rounding can explain, in nats.

    A token's loss has the error of its logits, which have standard deviation 1 in
    `make_scaled_model`. Averaging independent errors divides it by √tokens, and summing the losses
    adds the rounding of float32.
    """
    logit_error = rounding_tolerance(config.model, config.train.dtype)
    sqrt_tokens = math.sqrt(tokens)
    return logit_error / sqrt_tokens + loss * sqrt_tokens * 2.0**-24


def relative_distance(a: Any, b: Any) -> float:
    """Norm of the difference of two arrays, or trees of arrays, relative to the second's norm."""
    a, b = (flatten_params(tree) if isinstance(tree, dict) else {"": tree} for tree in (a, b))
    squares = [
        sum(float(mx.square(x.astype(mx.float32)).sum()) for x in arrays)
        for arrays in ([a[name] - b[name] for name in b], b.values())
    ]
    return math.sqrt(squares[0] / squares[1]) if squares[1] else math.inf


def use_cpu() -> AbstractContextManager:
    """Context that computes everything on the CPU, including compiled functions, whose graphs MLX
    caches per stream.
    """
    return mx.stream(mx.cpu)


def make_scaled_model(config: Config) -> GPT:
    """A model with larger initial weights, so that every part affects the output; with the usual
    ones attention contributes little. Matrices are scaled to give queries, keys and logits a
    standard deviation of 1.
    """
    checkpointing = config.train.gradient_checkpointing
    model = GPT(config.model, config.train.seed, gradient_checkpointing=checkpointing)
    scale = 1 / (INIT_STD * math.sqrt(config.model.n_embd))
    model.update(tree_map(lambda p: scale * p if p.ndim == 2 else p, model.parameters()))
    mx.eval(model.parameters())
    return model


def _compute_loss_and_gradient(config: Config) -> tuple[GPT, float, dict, mx.array, mx.array]:
    """Loss and gradient of a training step without dropout: (model, loss, gradient, inputs[1, T],
    targets[1, T]).
    """
    config = override_config(
        config, {"batch_size": 1, "gradient_accumulation_steps": 1, "dropout": 0.0}
    )
    model = make_scaled_model(config)
    batch = random_batch(config, 0)
    loss, gradient = TrainStep(model, config).compute_gradients(batch, mx.random.key(0))
    mx.eval(loss, gradient, batch)
    return model, float(loss), gradient, batch.inputs[0], batch.targets[0]


LEARNING_RATE = mx.array(6e-4)  # GPT-2's; the configured one is not used


def take_step(step_function: TrainStep, config: Config, n: int) -> tuple[float, float]:
    """Take step n on random tokens; returns its loss and gradient norm."""
    key = mx.random.key(derive_seed(config.train.seed, "check", n))
    loss, norm = step_function(random_batch(config, n), LEARNING_RATE, key)
    mx.eval(loss, norm, step_function.state)
    return float(loss), float(norm)


def random_batch(config: Config, n: int) -> Batch:
    """Random inputs and targets of step n, [A, B, T]."""
    t, block_size = config.train, config.model.block_size
    ids = random_ids(config, config.sequences_per_step, block_size + 1, n)
    shape = (t.gradient_accumulation_steps, t.batch_size, block_size)
    return Batch(ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape))


def random_ids(config: Config, rows: int, length: int, n: int = 0) -> mx.array:
    """Random ids[rows, length], different for each n."""
    key = mx.random.key(derive_seed(config.train.seed, "check ids", n))
    return mx.random.randint(0, config.model.vocab_size, (rows, length), key=key)
