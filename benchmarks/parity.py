"""Train the same model with nanoGPT's own code and with mlxgpt, from the same initial weights and
on the same batches, in float32 without dropout.

    pip install 'torch>=2.6,<3'
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/parity.py --nanogpt nanoGPT [--plot FILE.svg]
    python benchmarks/parity.py --nanogpt nanoGPT --config gpt2-124m --steps 20

Model, AdamW, weight decay, clipping and schedule are each project's own, except that nanoGPT's GELU
is replaced by GPT-2's, its tanh form. mlxgpt also trains a second copy with each batch in two
micro-batches, which is the same except for rounding: how far it gets from the first shows by how
much two correct programs may differ.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlxgpt  # isort: skip  # noqa: F401  loads its BLAS before mlx.core is imported
import mlx.core as mx
import numpy as np

from mlxgpt.bench.markdown import render_markdown_table
from mlxgpt.config import Config, override_config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.data.synthetic import generate_story
from mlxgpt.data.token_array import Batch, TokenArray
from mlxgpt.data.tokenizers.base import Tokenizer
from mlxgpt.data.tokenizers.bpe import train_bpe
from mlxgpt.data.tokenizers.char import CharTokenizer
from mlxgpt.model.parameters import flatten_params
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.step import make_train_step

STORIES = 4_000
BPE_VOCAB_SIZE = 4_096
SHOWN_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 300)


def main() -> None:
    """Print a table, and plot the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--nanogpt", required=True, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--config", default="tier1", help="built-in config or TOML file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the losses")
    args = parser.parse_args()
    config, tokens = prepare(args.config, args.steps)
    runs = [mlxgpt_losses(variant, tokens) for variant in (config, split_batches(config))]
    parameters = initial_parameters(config)
    runs.append(nanogpt_losses(args.nanogpt, config, tokens, parameters))
    ours, rounding, theirs = (np.array(list(losses)) for losses in runs)
    rows = [["step", "mlxgpt", "nanoGPT", "difference", "two micro-batches"]]
    for step in (step for step in SHOWN_STEPS if step <= args.steps):
        a, b, c = (losses[step - 1] for losses in (ours, theirs, rounding))
        rows.append([f"{step}", f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}", f"{abs(a - c):.1e}"])
    print("\n".join(render_markdown_table(rows)))
    difference, expected = (np.abs(ours - other).max() for other in (theirs, rounding))
    print(f"largest difference {difference:.1e}, with two micro-batches {expected:.1e}")
    if args.plot:
        plot(ours, theirs, np.abs(ours - rounding), args.plot)


def prepare(name: str, steps: int) -> tuple[Config, TokenArray]:
    """Config of float32 without dropout, and tokens of synthetic stories: characters, or BPE if the
    vocabulary is large.
    """
    _, config = resolve_config(None, name, dropout=0.0, dtype="float32", max_steps=steps)
    text = "\n".join(generate_story(n, 1) for n in range(STORIES))
    tokenizer: Tokenizer = CharTokenizer(text, end_of_text=False)
    if config.model.vocab_size > BPE_VOCAB_SIZE:
        tokenizer = train_bpe([text], BPE_VOCAB_SIZE)
        small_batch = {"batch_size": 4, "gradient_accumulation_steps": 1, "block_size": 256}
        config = override_config(config, small_batch)
    if not config.model.vocab_size:
        config = override_config(config, {"vocab_size": tokenizer.vocab_size})
    return config, TokenArray(tokenizer.encode(text), config.model.vocab_size)


def initial_parameters(config: Config) -> dict[str, np.ndarray]:
    """The initial weights of both, by mlxgpt's names: nanoGPT's without `transformer.`."""
    model = make_train_step(config).model
    return {name: np.array(value) for name, value in flatten_params(model.parameters()).items()}


def batches(config: Config, tokens: TokenArray) -> Iterator[Batch]:
    """The batches of all steps."""
    for step in range(config.train.max_steps):
        yield tokens.get_batch(
            step,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            block_size=config.model.block_size,
            micro_batches=config.train.gradient_accumulation_steps,
        )


def mlxgpt_losses(config: Config, tokens: TokenArray) -> Iterator[float]:
    """The loss of each step with mlxgpt."""
    step_function = make_train_step(config)
    learning_rate = learning_rate_schedule(config)
    for step, batch in enumerate(batches(config, tokens)):
        arrays = Batch(mx.array(batch.inputs), mx.array(batch.targets))
        loss, _ = step_function(arrays, learning_rate(step), mx.random.key(0))
        mx.eval(loss, step_function.state)
        yield float(loss)


def split_batches(config: Config) -> Config:
    """The config with the same batches, in twice as many micro-batches."""
    t = config.train
    halves = {"batch_size": t.batch_size // 2, "gradient_accumulation_steps": 2}
    return override_config(config, halves)


def nanogpt_losses(
    folder: str, config: Config, tokens: TokenArray, parameters: dict[str, np.ndarray]
) -> Iterator[float]:
    """The loss of each step with nanoGPT's model, optimizer and, as in its train.py, clipping."""
    import torch

    sys.path.append(folder)
    nanogpt: Any = importlib.import_module("model")
    m, o = config.model, config.optim
    shape = {
        name: getattr(m, name)
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
    }
    model = nanogpt.GPT(nanogpt.GPTConfig(**shape))
    state = {f"transformer.{name}": torch.tensor(value) for name, value in parameters.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    assert all(name.endswith(".attn.bias") for name in missing.missing_keys), missing
    for block in model.transformer.h:  # nanoGPT's GELU is exact; GPT-2's and mlxgpt's is not
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    optimizer = model.configure_optimizers(
        o.weight_decay, o.learning_rate, (o.beta1, o.beta2), "cpu"
    )
    learning_rate = nanogpt_schedule(folder, config)
    for step, batch in enumerate(batches(config, tokens)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        total = 0.0
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            _, loss = model(torch.tensor(inputs).long(), torch.tensor(targets).long())
            (loss / len(batch.inputs)).backward()
            total += loss.item() / len(batch.inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield total


def nanogpt_schedule(folder: str, config: Config) -> Callable[[int], float]:
    """The function `get_lr` of nanoGPT's train.py, which is a script, with a config's settings."""
    tree = ast.parse((Path(folder) / "train.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    tree.body = [node for node in functions if node.name == "get_lr"]
    o = config.optim
    namespace: dict[str, Any] = {
        "math": math,
        "learning_rate": o.learning_rate,
        "min_lr": o.learning_rate * o.min_lr_ratio,
        "warmup_iters": o.warmup_steps,
        "lr_decay_iters": o.decay_steps or config.train.max_steps,
    }
    exec(compile(tree, "train.py", "exec"), namespace)
    schedule: Callable[[int], float] = namespace["get_lr"]
    return schedule


def plot(ours: np.ndarray, theirs: np.ndarray, rounding: np.ndarray, path: Path) -> None:
    """Plot both losses, and their difference with that of rounding alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="tight")
    losses, differences = figure.subplots(1, 2)
    steps = np.arange(1, len(ours) + 1)
    losses.plot(steps, theirs, linewidth=4, alpha=0.4, label="nanoGPT")
    losses.plot(steps, ours, linewidth=1, color="black", label="mlxgpt")
    losses.set_ylabel("training loss, nats per token")
    differences.semilogy(steps, np.abs(ours - theirs), label="from nanoGPT")
    differences.semilogy(steps, rounding, label="two micro-batches")
    differences.set_ylabel("difference of the loss")
    for axes in (losses, differences):
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
