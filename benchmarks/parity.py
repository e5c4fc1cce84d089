"""Train the same model with PyTorch and with mlxgpt, from the same initial weights and on the same
batches, in float32 without dropout: with nanoGPT's own code, or the modern recipe with a second
implementation, modern_twin.py. Exits with 1 if the losses differ by more than the tolerance.

    pip install 'torch>=2.6,<3'
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/parity.py --nanogpt nanoGPT [--plot FILE.svg]
    python benchmarks/parity.py --nanogpt nanoGPT --config gpt2-124m --steps 20
    python benchmarks/parity.py --config tier1-modern --steps 100

Model, optimizer, weight decay, clipping and schedule are each project's own, except that nanoGPT's
GELU is replaced by GPT-2's, its tanh form. Each side also has a control, the same training except
for rounding: mlxgpt with each batch in two micro-batches, PyTorch in float64. How far the controls
get from the first runs shows by how much two correct programs may differ.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import torch

STORIES = 4_000
BPE_VOCAB_SIZE = 4_096
SHOWN_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 300)
TOLERANCE = 20  # times the largest difference of the controls so far


def main() -> None:
    """Print a table and whether the losses agree, and plot them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--nanogpt", metavar="DIR", help="a checkout of nanoGPT; not needed for the modern recipe"
    )
    parser.add_argument("--config", default="tier1", help="built-in config or TOML file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the losses")
    args = parser.parse_args()
    config, tokens = prepare(args.config, args.steps)
    is_modern = config.optim.optimizer == "muon"
    nanogpt = None if is_modern else args.nanogpt
    if not is_modern and not nanogpt:
        parser.error(f"--config {args.config} is compared with nanoGPT: add --nanogpt DIR")
    name = "PyTorch twin" if is_modern else "nanoGPT"
    theirs, exact = (
        np.array(list(pytorch_losses(config, tokens, nanogpt, dtype)))
        for dtype in ("float32", "float64")
    )
    ours, split = (
        np.array(list(mlxgpt_losses(variant, tokens)))
        for variant in (config, split_batches(config))
    )
    difference = np.abs(ours - theirs)
    controls = {"two micro-batches": np.abs(ours - split), "float64": np.abs(theirs - exact)}
    allowed = allowed_difference(ours, *controls.values())
    rows = [["step", "mlxgpt", name, "difference", *controls, "tolerance"]]
    for n in (step - 1 for step in SHOWN_STEPS if step <= args.steps):
        values = [f"{x[n]:.1e}" for x in (difference, *controls.values(), allowed)]
        rows.append([f"{n + 1}", f"{ours[n]:.6f}", f"{theirs[n]:.6f}", *values])
    print("\n".join(render_markdown_table(rows)))
    largest = [f"{label} {x.max():.1e}" for label, x in controls.items()]
    print(f"largest difference {difference.max():.1e}; of the controls: {', '.join(largest)}")
    if args.plot:
        plot(name, ours, theirs, controls, args.plot)
    agrees = difference <= allowed  # False for NaN
    if not agrees.all():
        n = int(np.argmin(agrees))
        sys.exit(f"step {n + 1}: the difference is {difference[n]:.1e}, above {allowed[n]:.1e}")
    share = (difference / allowed).max()
    print(f"within the tolerance at all {args.steps} steps, at most {share:.0%} of it")


def allowed_difference(losses: np.ndarray, *controls: np.ndarray) -> np.ndarray:
    """Tolerance of each step: `TOLERANCE` times the largest difference of the controls up to that
    step, and at least that of one rounding of the loss in float32.
    """
    unit = np.spacing(losses.astype(np.float32))
    return TOLERANCE * np.maximum.accumulate(np.maximum.reduce([unit, *controls]))


def prepare(name: str, steps: int) -> tuple[Config, TokenArray]:
    """Config of float32 without dropout, and tokens of synthetic stories: characters, or BPE if the
    vocabulary is large. A warmup of half the steps or more is reduced to a fifth of them, so that
    the learning rate also decays.
    """
    _, config = resolve_config(None, name, dropout=0.0, dtype="float32", max_steps=steps)
    if 2 * config.optim.warmup_steps >= steps:
        config = override_config(config, {"warmup_steps": steps // 5})
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
    B, A = config.train.batch_size, config.train.gradient_accumulation_steps
    return override_config(config, {"batch_size": B // 2, "gradient_accumulation_steps": 2 * A})


def pytorch_losses(
    config: Config, tokens: TokenArray, nanogpt: str | None, dtype: str = "float32"
) -> Iterator[float]:
    """The loss of each step with PyTorch.

    Args:
        nanogpt: a checkout of nanoGPT; None: the modern recipe.
        dtype: float32 or float64.
    """
    import torch

    torch_dtype = getattr(torch, dtype)
    parameters = {n: torch.tensor(p) for n, p in initial_parameters(config).items()}
    if nanogpt:
        return nanogpt_losses(nanogpt, config, tokens, parameters, torch_dtype)
    import modern_twin

    settings = vars(config.model) | vars(config.optim) | vars(config.train)
    for name, value in modern_twin.SETTINGS.items():
        if settings[name] != value:
            sys.exit(
                f"modern_twin.py does not implement {name} = {settings[name]}\n"
                "use --config tier1-modern or tier2-modern."
            )
    return modern_twin.twin_losses(config, batches(config, tokens), parameters, torch_dtype)


def nanogpt_losses(
    folder: str,
    config: Config,
    tokens: TokenArray,
    parameters: dict[str, torch.Tensor],
    dtype: torch.dtype,
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
    model = nanogpt.GPT(nanogpt.GPTConfig(**shape)).to(dtype)
    state = {f"transformer.{name}": value for name, value in parameters.items()}
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
        if o.grad_clip:
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


def plot(
    name: str, ours: np.ndarray, theirs: np.ndarray, controls: dict[str, np.ndarray], path: Path
) -> None:
    """Plot both losses, and their difference with those of the controls and the tolerance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="tight")
    losses, differences = figure.subplots(1, 2)
    steps = np.arange(1, len(ours) + 1)
    losses.plot(steps, theirs, linewidth=4, alpha=0.4, label=name)
    losses.plot(steps, ours, linewidth=1, color="black", label="mlxgpt")
    losses.set_ylabel("training loss, nats per token")
    differences.semilogy(steps, np.abs(ours - theirs), label=f"from {name}")
    for label, control in controls.items():
        differences.semilogy(steps, control, linewidth=1, label=label)
    allowed = allowed_difference(ours, *controls.values())
    differences.semilogy(steps, allowed, linestyle="--", color="gray", label="tolerance")
    differences.set_ylabel("difference of the loss")
    differences.set_ylim(bottom=1e-8)  # differences of 0 are not shown
    for axes in (losses, differences):
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
