"""Checks of the functions that a reader of docs/learn writes, against mlxgpt's own.

A check's parameters are the names of the reader's functions, which it is called with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import tiktoken

from mlxgpt.backend import ops
from mlxgpt.config import Config, ModelConfig, OptimConfig, TrainConfig
from mlxgpt.inference import sampling
from mlxgpt.learn.chapters import CHAPTERS
from mlxgpt.learn.claims import (
    CHECKS,
    Check,
    CheckFailedError,
    LearnResult,
    claim,
    require,
    require_close,
)
from mlxgpt.learn.reader_file import describe_error
from mlxgpt.model.gpt import GPT
from mlxgpt.model.losses import token_losses
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.utils.errors import UserError

CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, dropout=0.0, bias=False
)


def run_checks(chapter: int, functions: Mapping[str, Any]) -> list[LearnResult]:
    """Run the checks of a chapter.

    Args:
        chapter: number of the chapter, from 1.
        functions: the reader's functions by name.

    Raises:
        UserError: if there is no such chapter.
    """
    if not 1 <= chapter <= len(CHAPTERS):
        raise UserError(
            f"there is no chapter {chapter}", f"use a number from 1 to {len(CHAPTERS)}."
        )
    device = mx.default_device()
    mx.set_default_device(mx.cpu)  # a GPU may round more coarsely than the tolerance
    try:
        return [_run(check, functions) for check in CHECKS if check.chapter == chapter]
    finally:
        mx.set_default_device(device)


def _run(check: Check, functions: Mapping[str, Any]) -> LearnResult:
    missing = [name for name in check.function_names if not callable(functions.get(name))]
    result = LearnResult(check.claim)
    if missing:
        return replace(result, problem=f"missing: {', '.join(missing)}")
    try:
        check.test(**{name: functions[name] for name in check.function_names})
    except CheckFailedError as failure:
        return replace(result, problem=str(failure))
    except Exception as error:  # of the reader's code, which may raise anything
        return replace(result, problem=describe_error(error))
    return result


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    """Normal random values."""
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def _random_ids(*shape: int, seed: int = 0) -> mx.array:
    """Random token ids."""
    return mx.random.randint(0, CONFIG.vocab_size, shape, key=mx.random.key(seed))


def _reference_model() -> tuple[GPT, dict[str, Any]]:
    """A small GPT of the library, and its weights, with norms that are not all 1."""
    model = GPT(CONFIG)
    for index, (name, weight) in enumerate(flatten_params(model.parameters()).items()):
        noise = _normal(*weight.shape, seed=index, scale=0.1)
        model.load_weights([(name, weight + noise)], strict=False)
    return model, model.parameters()


@claim(1, "counts every pair of neighbors")
def check_counts(count_bigrams: Callable) -> None:
    require_close(count_bigrams(mx.array([0, 1, 1, 2, 0, 1]), 3), [[0, 2, 0], [0, 1, 1], [1, 0, 0]])


@claim(1, "probabilities of each row have sum 1, and none is 0")
def check_probabilities(bigram_probabilities: Callable) -> None:
    counts = mx.array([[0.0, 2.0, 1.0], [4.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    probabilities = bigram_probabilities(counts)
    require_close(probabilities.sum(axis=1), [1, 1, 1], what="sum of a row")
    require((probabilities > 0).all(), "a pair that was never seen has a probability of 0")
    require(probabilities[0, 1] > probabilities[0, 2], "more counts must be more likely")


@claim(1, "the loss is the mean of -ln(probability), ln V if all tokens are equally likely")
def check_bigram_loss(bigram_loss: Callable) -> None:
    require_close(bigram_loss(mx.full((4, 4), 0.25), mx.array([0, 1, 2, 3])), math.log(4))
    probabilities = mx.array([[0.9, 0.1], [0.5, 0.5]])
    expected = -(math.log(0.1) + math.log(0.5)) / 2
    require_close(bigram_loss(probabilities, mx.array([0, 1, 0])), expected)


@claim(2, "equals the library's cross-entropy within 1e-6, also for large logits")
def check_cross_entropy(cross_entropy: Callable) -> None:
    logits, targets = _normal(3, 5, CONFIG.vocab_size), _random_ids(3, 5)
    require_close(cross_entropy(logits, targets), token_losses(logits, targets), what="loss")
    logits = 1e4 * logits
    require_close(cross_entropy(logits, targets), token_losses(logits, targets), 1e-2, "loss")


@claim(2, "equals MLX's own gradient within 1e-6")
def check_gradient(cross_entropy_gradient: Callable) -> None:
    logits, targets = _normal(6, CONFIG.vocab_size), _random_ids(6)
    expected = mx.grad(lambda x: token_losses(x, targets).mean())(logits)
    require_close(cross_entropy_gradient(logits, targets), expected, what="gradient")


@claim(3, "no token attends to a later one, and the first only to itself")
def check_causal(attend: Callable) -> None:
    q, k, v = _normal(6, 4), _normal(6, 4, seed=1), _normal(6, 4, seed=2)
    before = attend(q, k, v)
    require_close(before[0], v[0], what="result of the first token")
    k[4:], v[4:] = 9.0, 9.0
    require_close(attend(q, k, v)[:4], before[:4], what="result, after a change of later tokens")


@claim(3, "equals the library's attention within 1e-6")
def check_attend(attend: Callable) -> None:
    q, k, v = (_normal(2, 3, 7, 8, seed=seed) for seed in range(3))
    require_close(attend(q, k, v), ops.causal_attention(q, k, v))


@claim(4, "layer norm and GELU equal the library's within 1e-6")
def check_layers(layer_norm: Callable, gelu: Callable) -> None:
    x, weight = _normal(3, 5, 16, scale=2.0), 1 + _normal(16, seed=1, scale=0.1)
    expected = ops.layer_norm(x, weight, None)
    require_close(layer_norm(x, {"weight": weight}), expected, what="layer norm")
    require_close(gelu(x), ops.gelu(x), what="GELU")


@claim(4, "your block equals the library's within 1e-6")
def check_block(block: Callable) -> None:
    model, weights = _reference_model()
    x = _normal(2, 6, CONFIG.n_embd)
    require_close(block(x, weights["h"][0], CONFIG.n_head), model.h[0](x))


@claim(5, "your GPT equals the library's within 1e-6")
def check_gpt(gpt: Callable) -> None:
    model, weights = _reference_model()
    ids = _random_ids(2, 8)
    require_close(gpt(ids, weights, CONFIG.n_head), model(ids), what="logits")


@claim(5, "its gradients equal the library's: the token embedding is also the output head")
def check_gpt_gradients(gpt: Callable) -> None:
    model, weights = _reference_model()
    ids, targets = _random_ids(2, 8), _random_ids(2, 8, seed=1)

    def reference_loss(weights: dict[str, Any]) -> mx.array:
        model.update(weights)
        return token_losses(model(ids), targets).mean()

    def loss(weights: dict[str, Any]) -> mx.array:
        return token_losses(gpt(ids, weights, CONFIG.n_head), targets).mean()

    gradients = flatten_params(mx.grad(loss)(weights))
    for name, expected in flatten_params(mx.grad(reference_loss)(weights)).items():
        require_close(gradients[name], expected, what=f"gradient of {name}")


@claim(5, "initial weights have GPT-2's names, shapes and standard deviations")
def check_init(init_weights: Callable) -> None:
    config = replace(CONFIG, n_embd=64, block_size=32, vocab_size=65)
    weights = flatten_params(init_weights(65, 32, config.n_layer, 64, mx.random.key(0)))
    for name, expected in flatten_params(GPT(config).parameters()).items():
        require(name in weights, f"missing: {name}")
        weight = weights[name]
        require(
            weight.shape == expected.shape, f"{name}: {weight.shape}, expected {expected.shape}"
        )
        if weight.ndim == 1:
            require_close(weight, expected, what=name)
        else:
            deviation, target = (float(mx.std(x)) for x in (weight, expected))
            require(
                0.9 < deviation / target < 1.1,
                f"{name}: standard deviation {deviation:.4f}, expected about {target:.4f}",
            )


@claim(5, "the first loss is ln V, within 0.1")
def check_first_loss(gpt: Callable, init_weights: Callable) -> None:
    weights = init_weights(65, 32, 2, 64, mx.random.key(0))
    ids = mx.random.randint(0, 65, (8, 33), key=mx.random.key(1))
    loss = token_losses(gpt(ids[:, :-1], weights, 4), ids[:, 1:]).mean().item()
    require(abs(loss - math.log(65)) < 0.1, f"{loss:.3f}; ln 65 = {math.log(65):.3f}")


@claim(6, "ten steps of AdamW equal MLX's within 1e-6")
def check_adamw(adamw: Callable) -> None:
    optimizer = optim.AdamW(1e-2, betas=[0.9, 0.99], weight_decay=0.1, bias_correction=True)
    weight, expected, zero = _normal(5, 4), {"w": _normal(5, 4)}, mx.zeros((5, 4))
    moments = zero, zero
    for step in range(1, 11):
        gradient = _normal(5, 4, seed=step)
        weight, moments = adamw(weight, gradient, moments, step, 1e-2)
        expected = optimizer.apply_gradients({"w": gradient}, expected)
        require_close(weight, expected["w"], what=f"weight after step {step}")


@claim(6, "matrices decay without a gradient, weights of norms do not")
def check_decay(update_weights: Callable, init_state: Callable) -> None:
    weights = {"c_fc": {"weight": mx.ones((3, 3))}, "ln_1": {"weight": mx.ones(3)}}
    gradients = {"c_fc": {"weight": mx.zeros((3, 3))}, "ln_1": {"weight": mx.zeros(3)}}
    new_weights, _ = update_weights(weights, gradients, init_state(weights), 1, 0.5)
    require_close(new_weights["c_fc"]["weight"], mx.full((3, 3), 0.95), what="matrix")
    require_close(new_weights["ln_1"]["weight"], mx.ones(3), what="weight of a norm")


@claim(7, "no token is both in the training and in the validation part")
def check_split(split_ids: Callable) -> None:
    ids = mx.arange(1000)
    train, val = split_ids(ids)
    require(len(train) > 0 and len(val) > 0, "a part is empty")
    require_close(mx.concatenate([train, val]), ids, what="both parts together")


@claim(7, "targets are the inputs, one token later")
def check_batch(get_batch: Callable) -> None:
    inputs, targets = get_batch(mx.arange(100), 4, 16, mx.random.key(0))
    require_close(inputs[:, 0:1] + mx.arange(16), inputs, what="inputs")
    require_close(targets, inputs + 1, what="targets")
    other, _ = get_batch(mx.arange(100), 4, 16, mx.random.key(1))
    require((other != inputs).any(), "two keys give the same batch")


@claim(7, "padding has no part in the loss")
def check_mask(masked_loss: Callable) -> None:
    logits, targets = _normal(2, 4, CONFIG.vocab_size), _random_ids(2, 4)
    mask = mx.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    losses = token_losses(logits, targets)
    expected = (losses[0, :3].sum() + losses[1, 0]) / 4
    require_close(masked_loss(logits, targets, mask), expected, what="loss")


@claim(7, "dropout keeps the mean, and has another mask at each call")
def check_dropout(make_dropout: Callable) -> None:
    drop, x = make_dropout(0.2, mx.random.key(0)), mx.ones((200, 200))
    y = drop(x)
    require_close((y == 0).mean(), 0.2, 0.01, "share of zeros")
    require_close(y.mean(), 1.0, 0.02, "mean")
    require((drop(x) != y).any(), "the same mask twice")


@claim(7, "the learning rate of each step equals the library's")
def check_schedule(learning_rate: Callable) -> None:
    config = Config(
        optim=OptimConfig(learning_rate=1e-2, min_lr_ratio=0.1, warmup_steps=5),
        train=TrainConfig(max_steps=50),
    )
    schedule = learning_rate_schedule(config)
    for step in range(50):
        rate = learning_rate(step, 1e-2, 5, 50)
        require_close(rate, schedule(step), 1e-8, f"learning rate of step {step}")


@claim(7, "gradients of micro-batches are those of the whole batch")
def check_accumulation(accumulate_gradients: Callable) -> None:
    inputs, targets = _normal(8, 3), _normal(8, seed=1)

    def loss(weights: dict[str, mx.array], inputs: mx.array, targets: mx.array) -> mx.array:
        return mx.square(inputs @ weights["w"] - targets).mean()

    loss_and_gradients, weights = mx.value_and_grad(loss), {"w": _normal(3, seed=2)}
    micro_batches = [(inputs[n : n + 2], targets[n : n + 2]) for n in range(0, 8, 2)]
    value, gradients = accumulate_gradients(loss_and_gradients, weights, micro_batches)
    expected_value, expected = loss_and_gradients(weights, inputs, targets)
    require_close(value, expected_value, what="loss")
    require_close(gradients["w"], expected["w"], what="gradient")


@claim(7, "the validation loss is that of the library: every window, no dropout")
def check_evaluate(evaluate: Callable) -> None:
    model, weights = _reference_model()
    ids = _random_ids(41)
    expected = token_losses(model(ids[:40].reshape(5, 8)), ids[1:41].reshape(5, 8)).mean()
    require_close(evaluate(weights, ids, CONFIG.n_head, 8), expected, what="loss")


@claim(8, "temperature, top-k and top-p equal the library's")
def check_filters(filter_logits: Callable) -> None:
    logits = _normal(5, CONFIG.vocab_size, scale=2.0)
    require_close(filter_logits(logits, temperature=0.5), logits / 0.5, what="temperature")
    for k in (1, 3):
        require_close(filter_logits(logits, top_k=k), sampling.top_k(logits, k), what=f"top-k {k}")
    for p in (0.3, 0.9):
        require_close(filter_logits(logits, top_p=p), sampling.top_p(logits, p), what=f"top-p {p}")


@claim(8, "tokens are drawn as often as their probability says")
def check_sample(sample: Callable) -> None:
    probabilities, count = mx.array([0.5, 0.2, 0.0, 0.3]), 20_000
    logits = mx.broadcast_to(mx.log(probabilities), (count, 4))
    drawn = sample(logits, mx.random.key(0))
    shares = mx.array([(drawn == token).mean().item() for token in range(4)])
    require(shares[2] == 0, "a token of probability 0 was drawn")
    require_close(shares, probabilities, 0.02, "share of a token")


@claim(9, "logits with the cache equal those without")
def check_cache(gpt_step: Callable) -> None:
    model, weights = _reference_model()
    ids, cache = _random_ids(3, 8), None
    expected = model(ids)
    for position in range(8):
        logits, cache = gpt_step(ids[:, position], weights, CONFIG.n_head, cache)
        require_close(logits, expected[:, position], what=f"logits of position {position}")


@claim(10, "encoding and decoding give the text back, and need fewer tokens than bytes")
def check_round_trip(train_bpe: Callable, encode: Callable, decode: Callable) -> None:
    merges = train_bpe("o rato roeu a roupa do rei de Roma. " * 5, 20)
    require(len(merges) == 20, f"{len(merges)} merges instead of 20")
    for text in ("", "a roupa do rei", "coração 🙂 日本"):
        require(decode(encode(text, merges), merges) == text, f"{text!r} does not come back")
    require(len(encode("a roupa do rei", merges)) < 14, "no pair was merged")


@claim(10, "the first merge is the most frequent pair, and encoding equals tiktoken's")
def check_bpe(train_bpe: Callable, encode: Callable) -> None:
    text = "she sells sea shells by the sea shore " * 3
    merges = train_bpe(text, 12)
    pairs = [(text[n], text[n + 1]) for n in range(len(text) - 1)]
    most = max(pairs.count(pair) for pair in pairs)
    first = (chr(merges[0][0]), chr(merges[0][1]))
    require(pairs.count(first) == most, f"the first merge is {''.join(first)!r}")
    tokens = [bytes([n]) for n in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "check", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={}
    )
    for sample in (text, "seashells she sees"):
        expected = encoding.encode(sample)
        require(encode(sample, merges) == expected, f"{sample[:20]!r}: expected {expected[:10]}")


@claim(10, "the law through exact points is found")
def check_power_law(fit_power_law: Callable) -> None:
    sizes = [1.0, 3.0, 10.0, 30.0]
    require_close(fit_power_law(sizes, [2.5 * n**-0.2 for n in sizes]), [2.5, 0.2], what="a, b")
