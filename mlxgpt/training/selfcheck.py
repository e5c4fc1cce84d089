"""The self-check: what must hold before a long run, each tried on the real code.

Most checks run on a shrunken copy of the config, in well under a second each; the initial loss, and
one step, at full size. Fixed seeds throughout: a check passes or it doesn't, no luck is involved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxgpt.config import Config, ModelConfig, Sampling, override, with_vocabulary
from mlxgpt.corpus.tokenizer import CharTokenizer
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.evaluation.loss import Evaluator
from mlxgpt.inference import sample
from mlxgpt.inference.sample import Rules
from mlxgpt.machine import blas, compiler, device
from mlxgpt.model.counting import mlp_width
from mlxgpt.model.gpt import GPT, INIT_STD, flat, with_room
from mlxgpt.model.losses import token_losses
from mlxgpt.seeds import derive
from mlxgpt.training.step import TrainStep, new_step

RATE = mx.array(6e-4)  # GPT-2's, since what must hold does not depend on the one asked for
WHY = (
    "Why ln V: an untrained model knows nothing, so the best it can do is to give each of the V "
    "tokens the same probability, 1/V. That costs -ln(1/V) = ln V nats, whichever token comes. "
    "GPT-2's initial weights do almost that. A logit is the dot product of a normalized vector, of "
    "length √n_embd, and a row of the head, whose entries are about 0.02. So logits scatter around "
    "0 by only 0.02·√n_embd, and their softmax is nearly flat; the scatter costs half its square, "
    "0.0002·n_embd nats. Where the head is the token embedding, the logit of the token just read "
    "stands out as well, by about 1 in a wide model. With thousands of tokens that costs nothing "
    "you can see; with a handful, a few tenths of a nat. A first loss far above the expected value "
    "means a model that is confidently wrong before it has seen anything (initial weights too "
    "large); one below it means that the model can see what it should predict (a broken mask)."
)


@dataclass(frozen=True)
class Check:
    """One check and its result.

    Attributes:
        name: what was checked.
        ok: whether it passed; None for what is only told, and cannot fail.
        detail: what was found.
        why: for whoever wants to understand it; may be empty.
    """

    name: str
    ok: bool | None
    detail: str
    why: str = ""


def check(config: Config) -> Iterator[Check]:
    """Run every check; the results come one by one.

    Args:
        config: the run to check.
    """
    config = with_vocabulary(device.resolve_dtype(config))
    for one in (matrix_products, fused_kernels, initial_loss, full_size_step):
        yield one(config)
    small = shrunken(config)
    for one in (
        *([tied_head] if config.model.tied else []),
        compiled_step,
        micro_batches,
        cached_logits,
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
    found = blas.status() if device.on_cpu() else "MLX's own kernels"
    rounded = "" if device.multiplies_exactly() else ", float32 rounded to TF32"
    return Check("matrix products", None, found + rounded)


def fused_kernels(config: Config) -> Check:
    """Whether MLX can fuse operations here: told, as above."""
    return Check("fused kernels", None, compiler.status() or "compiled")


def initial_loss(config: Config) -> Check:
    """An untrained model's loss, at full size, is what its initial weights should give.

    The targets are random, so the loss must be the mean over all possible targets, within the
    noise of drawing them: a model that sees its targets is off by much more. And that mean must be
    near its expected value, within what a draw of the head's V rows allows.
    """
    c, ln_v = config.model, math.log(config.model.vocab_size)
    ids = _ids(config, 8, min(c.block_size, 128) + 1)
    model = GPT(c, config.train.seed)
    logits = model(ids[:, :-1]).astype(mx.float32)  # [B, T, V]
    loss = float(token_losses(logits, ids[:, 1:]).mean())
    blind = float((mx.logsumexp(logits, axis=-1) - logits.mean(axis=-1)).mean())
    noise = math.sqrt(float(logits.var(axis=-1).mean()) / ids[:, 1:].size)
    head = model.wte.weight if c.tied else model.lm_head.weight
    excess, std = _expected_excess(c), math.sqrt(float(mx.square(head).mean()))
    ok = (
        abs(loss - blind) <= 6 * noise + 1e-4
        and blind - ln_v <= (2 + 12 / math.sqrt(c.vocab_size)) * excess + 1e-4
        and std <= 3 * INIT_STD
    )
    result = (
        f"{loss:.3f} nats; ln {c.vocab_size:,} = {ln_v:.3f}, expected about {ln_v + excess:.3f}"
    )
    return Check("initial loss", ok, result, WHY)


def _expected_excess(c: ModelConfig) -> float:
    """How far above ln V the initial weights bring the loss, in nats; exact to first order in the
    variance of the logits, and for the logit of the token just read.
    """
    variance = INIT_STD**2 * c.n_embd  # of a logit
    excess = variance / 2 * (1 - 1 / c.vocab_size)
    if c.tied:
        # The residual stream's variance: the token's own part, the position's, and the MLPs'.
        token = 1.0 if c.embedding_norm else INIT_STD**2
        position = INIT_STD**2 if c.position == "learned" else 0.0
        mlps = INIT_STD**2 / 2 * mlp_width(c) * variance / 4
        own = INIT_STD * c.n_embd * math.sqrt(token / (token + position + mlps))
        excess += math.log1p(math.expm1(own) / c.vocab_size) - own / c.vocab_size
    return excess


def full_size_step(config: Config) -> Check:
    """One training step at full size, on one sequence: finite loss, gradient and parameters."""
    config = override(config, {"batch_size": 1, "gradient_accumulation_steps": 1})
    step = new_step(config)
    loss, norm = _take(step, config, 0)
    parameters = flat(step.model.trainable_parameters())
    finite = all(bool(mx.isfinite(p).all()) for p in parameters.values())
    ok = finite and math.isfinite(loss) and math.isfinite(norm)
    found = f"loss {loss:.3f}, gradient norm {norm:.2f}"
    return Check(
        "one step at full size", ok, f"{found}, all finite" if ok else f"{found}: not finite"
    )


def tied_head(config: Config) -> Check:
    """After an update the output layer still is the token embedding: without the one, no logit."""
    step = new_step(config)
    _take(step, config, 0)
    step.model.wte.weight = mx.zeros_like(step.model.wte.weight)
    largest = float(mx.abs(step.model(_ids(config, 1, config.model.block_size))).max())
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
            _take(step, config, n)
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


def cached_logits(config: Config) -> Check:
    """Reading a text token by token with the cache gives the logits of reading it at once."""
    model = _lively(config)
    ids = _ids(config, 2, config.model.block_size)
    at_once = model(ids)
    first = max(1, config.model.block_size // 2)
    logits, cache = model.prefill(ids[:, :first], _int(first - 1))
    cache = with_room(cache, config.model.block_size)
    apart = [float(mx.abs(logits - at_once[:, first - 1]).max())]
    for t in range(first, config.model.block_size):
        logits, cache = model.decode(ids[:, t], cache, _int(t))
        apart.append(float(mx.abs(logits - at_once[:, t]).max()))
    far = max(apart)
    return Check("cached = uncached", far < _slack(1e-4), f"logits at most {far:.1e} apart")


def causality(config: Config) -> Check:
    """Changing token t changes no logit before t."""
    length = config.model.block_size
    if length < 2 or config.model.vocab_size < 2:
        return Check("causality", None, "nothing to see with one token")
    model = _lively(config)
    ids = _ids(config, 1, length)
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
        numbers, rules = sample.values(sampling), Rules.of(sampling, 8)
        keys = np.random.default_rng(n).integers(2**32, size=(draws, 2), dtype=np.uint32)
        ids = sample.draw(sample.process(rows, seen, numbers, rules), mx.array(keys))
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
    given: dict[str, Any] = {"bos": None, "batch_size": 4, "dtype": mx.float32}
    evaluate = Evaluator(steps[0].model, tokenizer, tokens, **given)
    losses = []
    for n in range(3):
        for step in steps:
            _take(step, config, n)
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
    x, y = _batch(config, 0)
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
            _take(step, config, n)
    apart = _apart(*(step.model.parameters() for step in steps))
    found = "bit for bit" if apart == 0 else f"only to {apart:.1e}: sums are reordered here"
    return Check("steps repeat", apart == 0 if device.on_cpu() else None, found)


def _slack(apart: float) -> float:
    """How far apart numbers may be that were multiplied in other shapes, and so perhaps in other
    kernels: more where some of them round to TF32.
    """
    return apart if device.multiplies_exactly() else 50 * apart


def _lively(config: Config) -> GPT:
    """A model in which every part matters: of what attention brings, initial weights let little
    through.
    """
    model = GPT(config.model, config.train.seed)
    model.update(tree_map(lambda p: 4 * p if p.ndim == 2 else p, model.parameters()))
    return model


def _take(step: TrainStep, config: Config, n: int) -> tuple[float, float]:
    """Take step n on random tokens: its loss and gradient norm."""
    key = mx.random.key(derive(config.train.seed, "check", n))
    loss, norm = step(*_batch(config, n), RATE, key)
    mx.eval(loss, norm, step.state)
    return float(loss), float(norm)


def _batch(config: Config, n: int) -> tuple[mx.array, mx.array]:
    t, block = config.train, config.model.block_size
    ids = _ids(config, config.sequences_per_step, block + 1, n)
    shape = (t.gradient_accumulation_steps, t.batch_size, block)
    return ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape)


def _ids(config: Config, rows: int, length: int, n: int = 0) -> mx.array:
    key = mx.random.key(derive(config.train.seed, "check ids", n))
    return mx.random.randint(0, config.model.vocab_size, (rows, length), key=key)


def _tokens(config: Config) -> Tokens:
    ids = np.array(_ids(config, 1, 20 * config.model.block_size)[0])
    return Tokens(ids, config.model.vocab_size)


def _int(n: int) -> mx.array:
    return mx.array([n], dtype=mx.int32)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _apart(a: Any, b: Any) -> float:
    """The largest difference between two parameter trees."""
    others = flat(b)
    return max(float(mx.abs(value - others[name]).max()) for name, value in flat(a).items())
