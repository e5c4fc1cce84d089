"""Self-check before training: tests the training step, evaluation and sampling of a config.

Most checks run on a shrunken copy of the config, in well under a second each; full_size_check.py
has those at full size. All seeds are fixed, so the results are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.config import Config, LoRAConfig, SamplingParams, fill_vocab_size, override_config
from mlxgpt.config.resolve import PathLike, resolve_config
from mlxgpt.data.token_array import Batch, TokenArray
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.evaluation.loss import EvalDataset, Evaluator, compile_eval_step
from mlxgpt.inference.sampling import SamplerSpec, make_sampler, pack_sampling_params
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.estimate import check_model_memory
from mlxgpt.training.full_size_check import (
    CheckResult,
    check_against_cpu,
    check_cached_logits,
    check_evaluation_loss,
    check_full_size_step,
    check_initial_loss,
    make_scaled_model,
    random_batch,
    random_ids,
    take_step,
)
from mlxgpt.training.step import TrainStep, make_train_step


def run_self_check(config: Config) -> Iterator[CheckResult]:
    """Run all checks on a config, and yield their results one by one."""
    config = fill_vocab_size(device.resolve_dtype(config))
    on_cpu = device.on_cpu()
    for check_function in (
        check_matrix_products,
        check_fused_kernels,
        check_initial_loss,
        check_full_size_step,
        *([] if on_cpu else [check_against_cpu, check_evaluation_loss, check_cached_logits]),
    ):
        yield check_function(config)
    small_config = shrink_config(config)
    for check_function in (
        *([check_tied_head] if config.model.tied else []),
        check_compiled_step,
        check_micro_batches,
        *([check_cached_logits] if on_cpu else []),
        check_causality,
        check_sampler,
        check_evaluation_side_effects,
        check_overfitting,
        check_repeatability,
    ):
        yield check_function(small_config)


def check(
    tier: int | None = None, *, config: PathLike | Config | None = None, **settings: Any
) -> list[CheckResult]:
    """Run the self-check of a config, without training."""
    resolved_config = resolve_config(tier, config, **settings)[1]
    check_model_memory(resolved_config)
    return list(run_self_check(resolved_config))


def shrink_config(config: Config) -> Config:
    """Shrink a config to a model that takes milliseconds, in float32, without dropout and LoRA."""
    model = config.model
    n_head = min(model.n_head, 2)
    overrides = {
        "n_layer": min(model.n_layer, 2),
        "n_head": n_head,
        "n_embd": n_head * 16,
        "block_size": min(model.block_size, 16),
        "vocab_size": min(model.vocab_size, 64),
        "dropout": 0.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "dtype": "float32",
    }
    return override_config(replace(config, lora=LoRAConfig()), overrides)


def check_matrix_products(config: Config) -> CheckResult:
    """Report which library computes matrix products, which determines the speed."""
    detail = execution.blas_status() if device.on_cpu() else "MLX's own kernels"
    tf32_note = "" if device.has_full_precision_matmul() else ", float32 rounded to TF32"
    return CheckResult("matrix products", None, detail + tf32_note)


def check_fused_kernels(config: Config) -> CheckResult:
    """Report whether MLX can compile fused kernels, which determines the speed."""
    return CheckResult("fused kernels", None, execution.compile_failure() or "compiled")


def check_tied_head(config: Config) -> CheckResult:
    """Check that the head stays tied after an update: a zeroed embedding gives zero logits."""
    step_function = make_train_step(config)
    take_step(step_function, config, 0)
    model = step_function.model
    model.wte.weight = mx.zeros_like(model.wte.weight)
    max_logit = float(mx.abs(model(random_ids(config, 1, config.model.block_size))).max())
    return CheckResult(
        "tied head",
        max_logit == 0,
        f"largest logit after an update with the embedding zeroed: {max_logit:g}",
    )


def check_compiled_step(config: Config) -> CheckResult:
    """Check that the compiled step matches the uncompiled one, dropout included."""
    # With the default eps, AdamW would amplify the rounding errors of gradients near 0.
    config = override_config(config, {"dropout": 0.1, "eps": 1e-3})
    step_functions = [make_train_step(config), make_train_step(config, compiled=False)]
    max_difference = _difference_after_steps(config, step_functions)
    return CheckResult(
        "compiled matches eager",
        max_difference < _tolerance(1e-5),
        f"parameters differ by at most {max_difference:.1e} after 3 steps",
    )


def check_micro_batches(config: Config) -> CheckResult:
    """Check that two micro-batches differ, and give the gradient of one batch of both."""
    full_batch_step = make_train_step(config)
    micro_batch_config = override_config(
        config, {"batch_size": 2, "gradient_accumulation_steps": 2}
    )
    micro_batch_step = make_train_step(micro_batch_config)
    tokens = _random_tokens(config)
    batch_args = {"seed": 0, "block_size": config.model.block_size}
    x, y, *_ = tokens.get_batch(0, batch_size=2, micro_batches=2, **batch_args)
    key = mx.random.key(0)
    is_different = bool((x[0] != x[1]).any())
    micro_batches = Batch(mx.array(x), mx.array(y))
    _, micro_batch_gradients = micro_batch_step.compute_gradients(micro_batches, key)
    full_batch_shape = (1, 4, config.model.block_size)
    full_batch = Batch(*(mx.array(ids.reshape(full_batch_shape)) for ids in (x, y)))
    _, full_batch_gradients = full_batch_step.compute_gradients(full_batch, key)
    max_difference = _max_difference(micro_batch_gradients, full_batch_gradients)
    return CheckResult(
        "gradient accumulation",
        is_different and max_difference < _tolerance(1e-5),
        f"gradients differ from one large batch by at most {max_difference:.1e}"
        if is_different
        else "both micro-batches have the same tokens",
    )


def check_causality(config: Config) -> CheckResult:
    """Check that changing token t does not change the logits before t."""
    length = config.model.block_size
    if length < 2 or config.model.vocab_size < 2:
        return CheckResult("causality", None, "not applicable: needs at least 2 tokens")
    model = make_scaled_model(config)
    ids = random_ids(config, 1, length)
    t = length // 2
    changed_ids = mx.array(ids)
    changed_ids[:, t] = (ids[:, t] + 1) % config.model.vocab_size
    logit_change = mx.abs(model(changed_ids) - model(ids)).max(axis=-1)[0]  # [T]
    max_before, min_after = float(logit_change[:t].max()), float(logit_change[t:].min())
    return CheckResult(
        "causality",
        max_before <= 1e-6 and min_after > 0,
        f"changing token {t} changes earlier logits by at most {max_before:g}, later ones by at "
        f"least {min_after:.1e}",
    )


def check_sampler(config: Config) -> CheckResult:
    """Check that sampled tokens follow the softmax, and that masked ones are never sampled."""
    draws = 20_000
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    probs = _softmax(logits / 0.8)
    # How many of the eight tokens each filter keeps; easy to count, since the logits are sorted.
    top_p_kept = int((probs.cumsum() < 0.75).sum()) + 1
    min_p_kept = int((probs >= 0.2 * probs[0]).sum())
    cases = {
        "no filter": (SamplingParams(temperature=0.8), 8),
        "top-k 3": (SamplingParams(temperature=0.8, top_k=3), 3),
        "top-p 0.75": (SamplingParams(temperature=0.8, top_p=0.75), top_p_kept),
        "min-p 0.2": (SamplingParams(temperature=0.8, min_p=0.2), min_p_kept),
    }
    shuffle = np.random.default_rng(0).permutation(8)  # so that the order does not matter
    max_z_score, leaked_draws = 0.0, 0
    rows = mx.array(np.tile(logits[shuffle], (draws, 1)))
    seen_mask = mx.zeros(rows.shape, dtype=mx.bool_)
    for n, (sampling, n_kept) in enumerate(cases.values()):
        draw = make_sampler(SamplerSpec.from_sampling(sampling, 8))
        values = pack_sampling_params(sampling)
        keys = np.random.default_rng(n).integers(2**32, size=(draws, 2), dtype=np.uint32)
        ids = draw(rows, seen_mask, values, mx.array(keys))
        frequencies = np.bincount(shuffle[np.array(ids)], minlength=8) / draws
        expected = np.where(np.arange(8) < n_kept, probs, 0) / probs[:n_kept].sum()
        leaked_draws += int((frequencies[n_kept:] > 0).sum())
        sigma = np.sqrt(expected[:n_kept] * (1 - expected[:n_kept]) / draws)
        z_scores = np.abs(frequencies - expected)[:n_kept] / sigma
        max_z_score = max(max_z_score, float(z_scores.max()))
    return CheckResult(
        "sampling distribution",
        max_z_score < 4 and not leaked_draws,
        f"{draws:,} samples each ({', '.join(cases)}): within {max_z_score:.1f} standard errors of "
        f"the softmax, {leaked_draws} masked tokens sampled",
    )


def check_evaluation_side_effects(config: Config) -> CheckResult:
    """Check that evaluating between steps does not affect training."""
    config = override_config(config, {"dropout": 0.1})
    step_functions = [make_train_step(config), make_train_step(config)]
    tokens = _random_tokens(config)
    letters = map(chr, range(ord("0"), ord("0") + config.model.vocab_size))
    tokenizer = CharTokenizer(letters, end_of_text=False)
    model, eval_dataset = step_functions[0].model, EvalDataset(tokens, tokenizer, None)
    evaluator = Evaluator(model, eval_dataset, compile_eval_step(model, mx.float32), batch_size=4)
    losses = []
    for n in range(3):
        for step_function in step_functions:
            take_step(step_function, config, n)
        losses += [evaluator().loss, evaluator().loss]
    max_difference = _max_difference(*(s.model.parameters() for s in step_functions))
    is_deterministic = losses[0::2] == losses[1::2]
    return CheckResult(
        "evaluation side effects",
        (max_difference == 0 and is_deterministic)
        or (not device.on_cpu() and max_difference < 1e-5),
        f"parameters differ by {max_difference:g} after 3 steps with and without evaluation; "
        f"repeated evaluations {'agree' if is_deterministic else 'differ'}",
    )


def check_overfitting(config: Config) -> CheckResult:
    """Check that one batch can be overfitted to a loss below 0.1 nats."""
    config = override_config(config, {"weight_decay": 0.0, "gradient_checkpointing": False})
    step_function = make_train_step(config)
    batch = random_batch(config, 0)
    loss, steps = math.inf, 0
    while loss >= 0.1 and steps < 400:
        value, _ = step_function(batch, mx.array(1e-2), mx.random.key(0))
        steps += 1
        if steps % 20 == 0:
            loss = float(value)
        else:
            mx.async_eval(step_function.state)
    return CheckResult("overfit one batch", loss < 0.1, f"loss {loss:.3f} after {steps} steps")


def check_repeatability(config: Config) -> CheckResult:
    """Check that steps are bit-for-bit repeatable. The CPU must pass, for exact resuming; on a GPU,
    which may sum in varying order, the result is only reported.
    """
    config = override_config(config, {"dropout": 0.1})
    step_functions = [make_train_step(config), make_train_step(config)]
    max_difference = _difference_after_steps(config, step_functions)
    detail = (
        "bit-identical"
        if max_difference == 0
        else f"equal to within {max_difference:.1e}: this device sums in varying order"
    )
    return CheckResult(
        "deterministic steps", max_difference == 0 if device.on_cpu() else None, detail
    )


def _tolerance(tolerance: float) -> float:
    """Tolerance for results of matrix products with different shapes, and thus perhaps different
    kernels; larger if some of them round to TF32.
    """
    return tolerance if device.has_full_precision_matmul() else 50 * tolerance


def _random_tokens(config: Config) -> TokenArray:
    ids = np.array(random_ids(config, 1, 20 * config.model.block_size)[0])
    return TokenArray(ids, config.model.vocab_size)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _difference_after_steps(config: Config, step_functions: list[TrainStep]) -> float:
    """Largest parameter difference of two step functions after 3 steps of each."""
    for n in range(3):
        for step_function in step_functions:
            take_step(step_function, config, n)
    return _max_difference(*(s.model.parameters() for s in step_functions))


def _max_difference(a: Any, b: Any) -> float:
    """Largest absolute difference between two parameter trees."""
    a, b = flatten_params(a), flatten_params(b)
    return max(float(mx.abs(a[name] - b[name]).max()) for name in a)
