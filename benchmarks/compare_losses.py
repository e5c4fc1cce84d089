"""Compare the loss of other projects' small trainers with mlxgpt's recipes, on the same tokens.

    python benchmarks/compare_losses.py DATA mlxgpt --config tier2-racing --steps 2438
    python benchmarks/compare_losses.py DATA nanochat --code DIR --rates 8 --minutes 5
    python benchmarks/compare_losses.py

DATA is a folder that `mlxgpt prepare` wrote. All trainers get the same windows of 256 tokens in the
same order, eight per step, and are judged on the whole validation text. A run adds a line to
RESULTS, unless it is already there. Without arguments, the results are printed as a table;
`--plot FILE.svg` also plots them over tokens, FLOPs and minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlxgpt  # isort: skip  # noqa: F401  loads its BLAS before mlx.core is imported
import numpy as np
from baselines.trainers import PROJECTS, MlxgptTrainer, Trainer

from mlxgpt.backend import execution
from mlxgpt.bench.markdown import render_markdown_table
from mlxgpt.config import Config, override_config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.data.dataset import Dataset, open_dataset
from mlxgpt.data.tokenizers.base import byte_lengths
from mlxgpt.utils.errors import UserError

TIMED_STEPS = 20  # after as many untimed ones: how long a step takes, for --minutes
LEADING_COLUMNS = ("trainer", "shape", "rates", "seed")


def main(argv: list[str] | None = None) -> int:
    """Train one model and record it, or print the table. Returns the exit code."""
    try:
        _run(argv)
    except UserError as error:
        print(f"compare_losses: {error.problem}\n  → {error.remedy}", file=sys.stderr)
        return 2
    return 0


def _run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA")
    parser.add_argument("trainer", nargs="?", choices=["mlxgpt", *PROJECTS])
    parser.add_argument("--code", type=Path, metavar="DIR", help="checkout of the project")
    parser.add_argument("--rates", type=float, default=1, metavar="X", help="factor for its rates")
    parser.add_argument(
        "--config", default="tier2-racing", help="mlxgpt's: built-in config or TOML file"
    )
    parser.add_argument("--shape", default="2x128", metavar="LxC", help="n_layer x n_embd")
    parser.add_argument("--seed", type=int, default=1)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=488)
    length.add_argument("--minutes", type=float, help="as many steps as fit")
    parser.add_argument("--results", type=Path, default=Path("compare_losses.jsonl"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the results")
    args = parser.parse_args(argv)
    results = _read_results(args.results)
    if not args.data or not args.trainer:
        print("\n".join(_render_table(results)))
        if args.plot:
            _plot_results(results, args.plot)
        return
    name = f"mlxgpt {Path(args.config).stem}" if args.trainer == "mlxgpt" else args.trainer
    key = dict(zip(LEADING_COLUMNS, (name, args.shape, args.rates, args.seed), strict=True))
    key |= {"minutes": args.minutes} if args.minutes else {"steps": args.steps}
    if any(key.items() <= result.items() for result in results):
        print(f"already in {args.results}")
        return
    for reason in execution.slow_reasons():
        print(reason)
    dataset = open_dataset(args.data)
    try:
        layers, width = map(int, args.shape.split("x"))
    except ValueError as error:
        problem = f"--shape {args.shape} is not a valid shape"
        raise UserError(problem, "use, for example, --shape 2x128.") from error
    _, config = resolve_config(None, args.config)
    config = override_config(
        config,
        {
            **{"n_layer": layers, "n_embd": width, "n_head": max(1, width // 64)},
            **{"vocab_size": dataset.meta.vocab_size, "block_size": 256, "batch_size": 8},
            **{"max_steps": args.steps, "seed": args.seed, "dtype": "float32"},
        },
    )

    def make_trainer(config: Config) -> Trainer:
        if args.trainer == "mlxgpt":
            return MlxgptTrainer(config)
        if not args.code or not args.code.is_dir():
            raise UserError(
                f"{args.code} is not a folder", f"pass a checkout of {args.trainer}: --code DIR."
            )
        try:
            return PROJECTS[args.trainer](args.code, config, args.rates)
        except (ImportError, OSError) as error:
            raise UserError(
                f"cannot load {args.trainer} from {args.code}: {error}",
                "check the folder, and install what the project needs.",
            ) from error

    result = key | _train_and_evaluate(make_trainer, config, dataset, args.minutes)
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


def _train_and_evaluate(
    make_trainer: Callable[[Config], Trainer],
    config: Config,
    dataset: Dataset,
    minutes: float | None,
) -> dict[str, Any]:
    """Train, and return what the table shows. The time is that of the steps."""

    def take_steps(trainer: Trainer, first: int, end: int) -> float:
        start = time.perf_counter()
        for step in range(first, end):
            inputs, targets, *_ = dataset.train.get_batch(
                step, seed=config.train.seed, batch_size=8, block_size=256
            )
            trainer.step(step, inputs[0], targets[0])
        return time.perf_counter() - start

    if minutes:
        trainer = make_trainer(config)
        take_steps(trainer, 0, TIMED_STEPS)
        seconds = take_steps(trainer, TIMED_STEPS, 2 * TIMED_STEPS)
        steps = max(1, round(minutes * 60 / seconds * TIMED_STEPS))
        config = override_config(config, {"max_steps": steps})
    trainer, steps = make_trainer(config), config.train.max_steps
    seconds = take_steps(trainer, 0, steps)
    tokens = steps * config.tokens_per_step
    return {
        "parameters": trainer.parameters,
        "tokens": tokens,
        "petaflops": trainer.flops * tokens / 1e15,
        "train_minutes": seconds / 60,
        "bits_per_byte": _evaluate(trainer, dataset),
    }


def _evaluate(trainer: Trainer, dataset: Dataset) -> float:
    """Bits per byte of the validation text, in windows of 256 tokens, as `mlxgpt eval` computes it:
    every token but the first is predicted once.
    """
    ids = np.asarray(dataset.val.ids, dtype=np.int32)
    whole = (len(ids) - 1) // 256 * 256
    inputs, targets = ids[:whole].reshape(-1, 256), ids[1 : whole + 1].reshape(-1, 256)
    batches = [(inputs[n : n + 8], targets[n : n + 8]) for n in range(0, len(inputs), 8)]
    if whole < len(ids) - 1:
        batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    total = sum(float(trainer.losses(*batch).sum(dtype=np.float64)) for batch in batches)
    return total / math.log(2) / int(byte_lengths(dataset.tokenizer)[ids[1:]].sum())


def _read_results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _render_table(results: list[dict[str, Any]]) -> list[str]:
    rows = [[*LEADING_COLUMNS, "parameters", "tokens", "petaFLOPs", "minutes", "bits per byte"]]
    for r in sorted(results, key=lambda result: result["bits_per_byte"]):
        numbers = [f"{r['parameters']:,}", f"{r['tokens']:,}", f"{r['petaflops']:.3g}"]
        rows.append(
            [str(r[name]) for name in LEADING_COLUMNS]
            + [*numbers, f"{r['train_minutes']:.1f}", f"{r['bits_per_byte']:.4f}"]
        )
    return render_markdown_table(rows)


def _plot_results(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the loss of each run over what it took: tokens, FLOPs and minutes."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    labels = {"tokens": "tokens", "petaflops": "petaFLOPs", "train_minutes": "minutes"}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for trainer in sorted({result["trainer"] for result in results}):
            runs = [result for result in results if result["trainer"] == trainer]
            losses = [run["bits_per_byte"] for run in runs]
            axis.plot([run[name] for run in runs], losses, "o", label=trainer, alpha=0.6)
        axis.set_xlabel(label)
        axis.set_xscale("log")
    axes[0].set_ylabel("bits per byte")
    axes[-1].legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
