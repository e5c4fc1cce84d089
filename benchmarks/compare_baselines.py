"""Compare the speed of mlxgpt with PyTorch, transformers, mlx-lm, nanoGPT and datasets: training,
generation, learning and data preparation. Takes half an hour or more.

    pip install -e '.[baselines]'
    python benchmarks/compare_baselines.py [--tier 1] [--nanogpt DIR] [--output DIR]

Writes JSON and Markdown to benchmarks/reports. Libraries that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

from baselines.records import Comparison
from baselines.report import render_markdown, write_comparison
from baselines.runner import (
    DEFAULT_SETTINGS,
    BenchmarkModel,
    BenchmarkSettings,
    installed_frameworks,
    run_tasks,
)

from mlxgpt.bench import speed
from mlxgpt.config import override_config, toml
from mlxgpt.utils.errors import UserError

logger = logging.getLogger("baselines")

# The smallest config in nanoGPT's README, for a MacBook's CPU.
NANOGPT_CPU_CONFIG = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12}


def select_models(tier: int | None) -> list[BenchmarkModel]:
    """Models to measure: one tier or both, nanoGPT's CPU config in training, and GPT-2 124M in
    generation.
    """
    tiers = [
        BenchmarkModel(f"tier{n}", speed.resolve_vocab_and_dtype(toml.load_tier_config(n)))
        for n in (1, 2)
    ]
    nanogpt_config = speed.resolve_vocab_and_dtype(
        override_config(toml.load_tier_config(1), NANOGPT_CPU_CONFIG)
    )
    gpt2_config = speed.resolve_vocab_and_dtype(
        toml.load_config(toml.find_builtin_configs()["gpt2-124m"])
    )
    return [
        *([tiers[tier - 1]] if tier else tiers),
        BenchmarkModel("nanoGPT's for a CPU", nanogpt_config, batch_sizes=()),
        BenchmarkModel("gpt2-124m", gpt2_config, has_training=False, batch_sizes=(1,)),
    ]


INSTALL_COMMAND = "pip install -e '.[baselines]'"


def main(argv: list[str] | None = None, settings: BenchmarkSettings = DEFAULT_SETTINGS) -> int:
    """Run the benchmarks, write the report, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tier", type=int, choices=(1, 2), help="only this tier")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="your checkout of nanoGPT")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path(__file__).with_name("reports")
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        frameworks, missing = installed_frameworks(args.nanogpt)
        args.output.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        problem, remedy = error.problem, error.remedy
    except OSError as error:
        problem = f"cannot write {args.output}: {error.strerror}"
        remedy = "choose another folder: --output DIR"
    else:
        if missing:
            names = ", ".join(missing)
            logger.info(f"not installed, left out: {names}. To get all: {INSTALL_COMMAND}")
        date = datetime.now(UTC).isoformat(timespec="seconds")
        machine = speed.describe_machine()  # before measuring adds to the load
        models = select_models(args.tier)
        results = run_tasks(models, frameworks, nanogpt=args.nanogpt, settings=settings)
        comparison = Comparison(date, machine, tuple(results))
        paths = write_comparison(comparison, args.output)
        print(render_markdown(comparison))
        logger.info(f"written to {paths[0]} and {paths[1].name}")
        return 0
    print(f"compare_baselines: {problem}\n  → {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
