"""Twelve faults, each a change of my_gpt.py that trains and is wrong.

    python docs/learn/faults.py 3 > fault.py       write the third faulty program
    mlxgpt learn check 7 --file fault.py           look for the fault with the checks of a chapter

Each is also a change of mlxgpt itself, which a test of mlxgpt must find: see
tests/course/test_mutants.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

MY_GPT = Path(__file__).parent / "my_gpt.py"

BLOCK_SIZE, N_LAYER, N_EMBD, N_HEAD, STEPS = 32, 1, 32, 4, 300
TEXT_LENGTH = 20_000  # short, so that a model can memorize it
PADDING = "▯"


@dataclass(frozen=True)
class Fault:
    """A fault of my_gpt.py.

    Attributes:
        name: the fault in a few words.
        chapter: the first chapter whose checks find it.
        change: text of my_gpt.py, and what replaces it.
    """

    name: str
    chapter: int
    change: tuple[str, str]


FAULTS = (
    Fault(
        "top-k keeps the least likely tokens",
        8,
        ("mx.where(logits < kth, -mx.inf, logits)", "mx.where(logits > kth, -mx.inf, logits)"),
    ),
    Fault(
        "the causal mask is off by one",
        3,
        (
            "is_past = mx.arange(T) <= mx.arange(T)[:, None]",
            "is_past = mx.arange(T) <= mx.arange(T)[:, None] + 1",
        ),
    ),
    Fault(
        "the tied head is not tied: the embedding gets no gradient from it",
        5,
        (
            'weights["ln_f"]), weights["wte"])\n\n\n# Chapter 6',
            'weights["ln_f"]), tree_map(mx.stop_gradient, weights["wte"]))\n\n\n# Chapter 6',
        ),
    ),
    Fault(
        "the validation text is also trained on",
        7,
        ("return ids[:n], ids[n:]", "return ids, ids[n:]"),
    ),
    Fault(
        "dropout is on at evaluation",
        7,
        (
            "gpt(inputs, weights, n_head), targets)",
            "gpt(inputs, weights, n_head, make_dropout(0.1, mx.random.key(0))), targets)",
        ),
    ),
    Fault(
        "every token of the cache has position 0",
        9,
        ("position = 0 if cache[0] is None else cache[0][0].shape[2]", "position = 0"),
    ),
    Fault(
        "heads are cut out of the wrong axis, which mixes tokens",
        4,
        (
            "x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)",
            "x.reshape(B, n_head, T, C // n_head)",
        ),
    ),
    Fault(
        "padding has a part in the loss",
        7,
        (
            "(cross_entropy(logits, targets) * mask).sum() / mask.sum()",
            "cross_entropy(logits, targets).mean()",
        ),
    ),
    Fault(
        "the schedule is one step late",
        7,
        ("    if step < warmup_steps:\n", "    step = step - 1\n    if step < warmup_steps:\n"),
    ),
    Fault(
        "targets are not shifted",
        7,
        ("return ids[positions], ids[positions + 1]", "return ids[positions], ids[positions]"),
    ),
    Fault(
        "AdamW without bias correction",
        6,
        (
            "m_hat = m / (1 - beta1**step)\n    v_hat = v / (1 - beta2**step)",
            "m_hat = m\n    v_hat = v",
        ),
    ),
    Fault(
        "the first micro-batch is used again instead of the others",
        7,
        (
            "loss_and_gradients(weights, *micro_batch)",
            "loss_and_gradients(weights, *micro_batches[0])",
        ),
    ),
)


def make_faulty_source(number: int) -> str:
    """The text of my_gpt.py with a fault, numbered from 1; 0: without."""
    source = MY_GPT.read_text(encoding="utf-8")
    if not number:
        return source
    old, new = FAULTS[number - 1].change
    assert source.count(old) == 1, f"fault {number}: {source.count(old)} places"
    return source.replace(old, new)


def load_program(number: int) -> dict[str, Any]:
    """The functions of my_gpt.py with a fault."""
    functions: dict[str, Any] = {}
    exec(compile(make_faulty_source(number), f"fault {number}", "exec"), functions)
    return functions


@dataclass
class Curves:
    """What a reader sees of a program: losses of each step, validation losses as (step, loss), and
    a sample.
    """

    train: list[float] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    sample: str = ""


def run_program(functions: dict[str, Any], text: str) -> Curves:
    """Train a small GPT with the functions of a my_gpt.py, and sample from it."""
    f = functions
    characters = [*sorted(set(text)), PADDING]
    ids = mx.array([characters.index(character) for character in text])
    train_ids, val_ids = f["split_ids"](ids)
    weights = f["init_weights"](len(characters), BLOCK_SIZE, N_LAYER, N_EMBD, mx.random.key(0))
    state, curves = f["init_state"](weights), Curves()
    train_step = mx.compile(make_train_step(f))
    for step in range(STEPS):
        keys = mx.random.split(mx.random.key(step + 1), 2)
        micro_batches = [make_rows(f, train_ids, key, len(characters) - 1) for key in keys]
        rate = mx.array(f["learning_rate"](step, 1e-2, 20, STEPS))
        loss, weights, state = train_step(weights, state, micro_batches, mx.array(step + 1.0), rate)
        mx.eval(weights, state)
        curves.train.append(loss.item())
        if step % 50 == 49:
            loss = f["evaluate"](weights, val_ids, N_HEAD, BLOCK_SIZE)
            curves.val.append((step + 1, loss.item()))
    curves.sample = write_sample(f, weights, characters)
    return curves


def make_rows(f: dict[str, Any], ids: mx.array, key: mx.array, padding: int) -> tuple[Any, ...]:
    """Inputs, targets and mask [B, T] of texts of different lengths, padded; and a key."""
    inputs, targets = f["get_batch"](ids, 8, BLOCK_SIZE, key)
    lengths = mx.random.randint(BLOCK_SIZE // 2, BLOCK_SIZE + 1, (8, 1), key=key)
    is_text = mx.arange(BLOCK_SIZE) < lengths
    return (
        mx.where(is_text, inputs, padding),
        mx.where(is_text, targets, padding),
        is_text.astype(mx.float32),
        key,
    )


def make_train_step(f: dict[str, Any]) -> Callable[..., Any]:
    """Function of weights, state, micro-batches, number and learning rate of a step."""

    def loss(weights: Any, inputs: Any, targets: Any, mask: Any, key: Any) -> mx.array:
        drop = f["make_dropout"](0.1, key)
        return f["masked_loss"](f["gpt"](inputs, weights, N_HEAD, drop), targets, mask)

    def train_step(weights: Any, state: Any, micro_batches: Any, step: Any, rate: Any) -> Any:
        value, gradients = f["accumulate_gradients"](
            mx.value_and_grad(loss), weights, micro_batches
        )
        return value, *f["update_weights"](weights, gradients, state, step, rate)

    return train_step


def write_sample(f: dict[str, Any], weights: Any, characters: list[str]) -> str:
    """Continue a newline by as many characters as the context has, top-k 10, with the cache."""
    ids, cache = [characters.index("\n")], None
    for key in mx.random.split(mx.random.key(0), BLOCK_SIZE - 1):
        logits, cache = f["gpt_step"](mx.array(ids[-1:]), weights, N_HEAD, cache)
        ids.append(f["sample"](f["filter_logits"](logits, top_k=10), key).item())
    return "".join(characters[n] for n in ids[1:])


if __name__ == "__main__":
    sys.stdout.write(make_faulty_source(int(sys.argv[1])))
