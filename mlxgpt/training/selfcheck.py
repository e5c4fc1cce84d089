"""The self-check: what must hold before a long run, each tried on the real code.

Most checks run on a shrunken copy of the config, in well under a second each; full_size_check.py
has those at full size. Fixed seeds throughout: a check passes or it doesn't, no luck is involved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt.backend import device, execution
from mlxgpt.config import Config, Sampling, override, with_vocabulary
from mlxgpt.data.token_array import Tokens
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.evaluation.loss import EvalText, Evaluator, eval_step
from mlxgpt.inference.sampling import SamplerSpec, make_sampler, setting_values
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.full_size_check import (
    Check,
    against_the_cpu,
    cached_logits,
    evaluation_loss,
    full_size_step,
    initial_loss,
    random_batch,
    random_ids,
    scaled_model,
    take_step,
)
from mlxgpt.training.step import new_step


def check(config: Config) -> Iterator[Check]:
    """Run every check; the results come one by one.

    Args:
        config: the run to check.
    """
    config = with_vocabulary(device.resolve_dtype(config))
    on_cpu = device.on_cpu()
    for one in (
        matrix_products,
        fused_kernels,
        initial_loss,
        full_size_step,
        *([] if on_cpu else [against_the_cpu, evaluation_loss, cached_logits]),
    ):
        yield one(config)
    small = shrunken(config)
    for one in (
        *([tied_head] if config.model.tied else []),
        compiled_step,
        micro_batches,
        *([cached_logits] if on_cpu else []),
        causality,
        sampler,
        evaluation,
        overfitting,
        repeatability,
    ):
        yield one(small)


def shrunken(config: Config) -> Config:
    """A copy of the same kind that takes milliseconds: float32, and no dropout."""
    model = config.model
    heads = min(model.n_head, 2)
    shape = {
        "n_layer": min(model.n_layer, 2),
        "n_head": heads,
        "n_embd": heads * 16,
        "block_size": min(model.block_size, 16),
        "vocab_size": min(model.vocab_size, 64),
        "dropout": 0.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "dtype": "float32",
    }
    return override(config, shape)


def matrix_products(config: Config) -> Check:
    """What computes matrix products here: told, since it decides the speed."""
    found = execution.blas_status() if device.on_cpu() else "MLX's own kernels"
    rounded = "" if device.multiplies_exactly() else ", float32 rounded to TF32"
    return Check("matrix products", None, found + rounded)


def fused_kernels(config: Config) -> Check:
    """Whether MLX can fuse operations here: told, as above."""
    return Check("fused kernels", None, execution.compile_failure() or "compiled")


def tied_head(config: Config) -> Check:
    """After an update the output layer still is the token embedding: without the one, no logit."""
    step = new_step(config)
    take_step(step, config, 0)
    step.model.wte.weight = mx.zeros_like(step.model.wte.weight)
    largest = float(mx.abs(step.model(random_ids(config, 1, config.model.block_size))).max())
    return Check(
        "tied head",
        largest == 0,
        f"after an update, a zeroed embedding leaves logits of at most {largest:g}",
    )


def compiled_step(config: Config) -> Check:
    """The compiled step does what the same operations do one by one, dropout included."""
    # With AdamW's own eps the sign alone counts of a gradient near 0, and that may be rounding's.
    config = override(config, {"dropout": 0.1, "eps": 1e-3})
    steps = [new_step(config), new_step(config, compiled=False)]
    for n in range(3):
        for step in steps:
            take_step(step, config, n)
    apart = _apart(*(step.model.parameters() for step in steps))
    return Check(
        "compiled = eager",
        apart < _slack(1e-5),
        f"parameters at most {apart:.1e} apart after 3 steps",
    )


def micro_batches(config: Config) -> Check:
    """Two micro-batches are different, and give the gradient of one batch of both."""
    whole = new_step(config)
    halves_config = override(config, {"batch_size": 2, "gradient_accumulation_steps": 2})
    halves = new_step(halves_config)
    tokens = _tokens(config)
    size = {"seed": 0, "block_size": config.model.block_size}
    x, y = map(mx.array, tokens.batch(0, batch_size=2, micro_batches=2, **size))
    key = mx.random.key(0)
    different = bool((x[0] != x[1]).any())
    _, by_two = halves.gradients(x, y, key)
    one = (1, 4, config.model.block_size)
    _, by_one = whole.gradients(x.reshape(one), y.reshape(one), key)
    apart = _apart(by_two, by_one)
    return Check(
        "micro-batches = one batch",
        different and apart < _slack(1e-5),
        f"gradients at most {apart:.1e} apart" if different else "both hold the same tokens",
    )


def causality(config: Config) -> Check:
    """Changing token t changes no logit before t."""
    length = config.model.block_size
    if length < 2 or config.model.vocab_size < 2:
        return Check("causality", None, "nothing to see with one token")
    model = scaled_model(config)
    ids = random_ids(config, 1, length)
    t = length // 2
    changed = mx.array(ids)
    changed[:, t] = (ids[:, t] + 1) % config.model.vocab_size
    change = mx.abs(model(changed) - model(ids)).max(axis=-1)[0]  # [T]
    before, after = float(change[:t].max()), float(change[t:].min())
    return Check(
        "causality",
        before <= 1e-6 and after > 0,
        f"changing token {t}: at most {before:g} before it, at least {after:.1e} from it on",
    )


def sampler(config: Config) -> Check:
    """Drawn tokens have the frequencies of the softmax, and masked ones never come."""
    draws = 20_000
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    probs = _softmax(logits / 0.8)
    # By hand, since the logits are sorted: what each filter leaves of these eight tokens.
    cases = {
        "none": (Sampling(temperature=0.8), 8),
        "top-k 3": (Sampling(temperature=0.8, top_k=3), 3),
        "top-p 0.75": (
            Sampling(temperature=0.8, top_p=0.75),
            int((probs.cumsum() < 0.75).sum()) + 1,
        ),
        "min-p 0.2": (Sampling(temperature=0.8, min_p=0.2), int((probs >= 0.2 * probs[0]).sum())),
    }
    shuffle = np.random.default_rng(0).permutation(8)  # so that order is no help
    worst, leaked = 0.0, 0
    rows = mx.array(np.tile(logits[shuffle], (draws, 1)))
    seen = mx.zeros(rows.shape, dtype=mx.bool_)
    for n, (sampling, left) in enumerate(cases.values()):
        draw, values = make_sampler(SamplerSpec.of(sampling, 8)), setting_values(sampling)
        keys = np.random.default_rng(n).integers(2**32, size=(draws, 2), dtype=np.uint32)
        ids = draw(rows, seen, values, mx.array(keys))
        found = np.bincount(shuffle[np.array(ids)], minlength=8) / draws
        wanted = np.where(np.arange(8) < left, probs, 0) / probs[:left].sum()
        leaked += int((found[left:] > 0).sum())
        sigma = np.sqrt(wanted[:left] * (1 - wanted[:left]) / draws)
        worst = max(worst, float((np.abs(found - wanted)[:left] / sigma).max()))
    return Check(
        "sampler = softmax",
        worst < 4 and not leaked,
        f"{draws:,} draws for each of {', '.join(cases)}: at most {worst:.1f} standard errors off, "
        f"{leaked} masked tokens drawn",
    )


def evaluation(config: Config) -> Check:
    """Evaluating between two steps changes nothing in the training."""
    config = override(config, {"dropout": 0.1})
    steps = [new_step(config), new_step(config)]
    tokens = _tokens(config)
    letters = map(chr, range(ord("0"), ord("0") + config.model.vocab_size))
    tokenizer = CharTokenizer(letters, end_of_text=False)
    model, text = steps[0].model, EvalText(tokens, tokenizer, None)
    evaluate = Evaluator(model, text, eval_step(model, mx.float32), batch_size=4)
    losses = []
    for n in range(3):
        for step in steps:
            take_step(step, config, n)
        losses += [evaluate().loss, evaluate().loss]
    apart = _apart(*(step.model.parameters() for step in steps))
    same = losses[0::2] == losses[1::2]
    return Check(
        "evaluation leaves no trace",
        (apart == 0 and same) or (not device.on_cpu() and apart < 1e-5),
        f"parameters {apart:g} apart after 3 steps with and without it; "
        f"{'twice the same' if same else 'two different'} results",
    )


def overfitting(config: Config) -> Check:
    """One batch can be learned by heart, below 0.1 nats: loss, gradients and updates agree."""
    config = override(config, {"weight_decay": 0.0, "gradient_checkpointing": False})
    step = new_step(config)
    x, y = random_batch(config, 0)
    loss, steps = math.inf, 0
    while loss >= 0.1 and steps < 400:
        value, _ = step(x, y, mx.array(1e-2), mx.random.key(0))
        steps += 1
        if steps % 20 == 0:
            loss = float(value)
        else:
            mx.async_eval(step.state)
    return Check("one batch by heart", loss < 0.1, f"loss {loss:.3f} after {steps} steps")


def repeatability(config: Config) -> Check:
    """Whether a step repeats bit for bit here. On the CPU it must, or resuming is not exact; on a
    GPU, which may add in another order, it is only told.
    """
    config = override(config, {"dropout": 0.1})
    steps = [new_step(config), new_step(config)]
    for n in range(3):
        for step in steps:
            take_step(step, config, n)
    apart = _apart(*(step.model.parameters() for step in steps))
    found = "bit for bit" if apart == 0 else f"only to {apart:.1e}: sums are reordered here"
    return Check("steps repeat", apart == 0 if device.on_cpu() else None, found)


def _slack(apart: float) -> float:
    """How far apart numbers may be that were multiplied in other shapes, and so perhaps in other
    kernels: more where some of them round to TF32.
    """
    return apart if device.multiplies_exactly() else 50 * apart


def _tokens(config: Config) -> Tokens:
    ids = np.array(random_ids(config, 1, 20 * config.model.block_size)[0])
    return Tokens(ids, config.model.vocab_size)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _apart(a: Any, b: Any) -> float:
    """The largest difference between two parameter trees."""
    others = flatten_params(b)
    return max(
        float(mx.abs(value - others[name]).max()) for name, value in flatten_params(a).items()
    )
