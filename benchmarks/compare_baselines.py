"""Speed of mlxgpt next to PyTorch, transformers, mlx-lm, nanoGPT and datasets at the same tasks:
training, generation, learning, and data preparation. Takes half an hour or more.

    pip install -e '.[baselines]'
    python benchmarks/compare_baselines.py [--tier 1] [--nanogpt DIR] [--out DIR]

Writes JSON and Markdown into benchmarks/reports. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

from baselines.records import Comparison
from baselines.report import render_markdown, write_comparison
from baselines.runner import PLAN, Job, Plan, installed_frameworks, run_tasks

from mlxgpt.bench import speed
from mlxgpt.config import override_config, toml
from mlxgpt.utils.errors import UserError

logger = logging.getLogger("baselines")

INSTALL = "pip install -e '.[baselines]'"
# The smallest model in nanoGPT's README, for a MacBook's CPU.
NANOGPT_ON_A_CPU = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12}


def jobs_of(tier: int | None) -> list[Job]:
    """The models to measure: the tiers, nanoGPT's smallest in training, GPT-2's size writing."""
    tiers = [
        Job(f"tier{n}", speed.resolve_vocab_and_dtype(toml.load_tier_config(n))) for n in (1, 2)
    ]
    small = speed.resolve_vocab_and_dtype(
        override_config(toml.load_tier_config(1), NANOGPT_ON_A_CPU)
    )
    large = speed.resolve_vocab_and_dtype(
        toml.load_config(toml.find_builtin_configs()["gpt2-124m"])
    )
    return [
        *([tiers[tier - 1]] if tier else tiers),
        Job("nanoGPT's for a CPU", small, texts=()),
        Job("gpt2-124m", large, trains=False, texts=(1,)),
    ]


def main(arguments: list[str] | None = None, plan: Plan = PLAN) -> int:
    """Measure and write the report; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tier", type=int, choices=(1, 2), help="only this tier")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="your checkout of nanoGPT")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(__file__).with_name("reports")
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        frameworks, missing = installed_frameworks(args.nanogpt)
        args.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        problem, remedy = error.problem, error.remedy
    except OSError as error:
        problem, remedy = f"cannot write {args.out}: {error.strerror}", "choose another: --out DIR"
    else:
        if missing:
            logger.info(f"not installed, left out: {', '.join(missing)}. To get all: {INSTALL}")
        date = datetime.now(UTC).isoformat(timespec="seconds")
        machine = speed.describe_machine()  # before measuring adds to the load
        results = run_tasks(jobs_of(args.tier), frameworks, nanogpt=args.nanogpt, plan=plan)
        comparison = Comparison(date, machine, tuple(results))
        paths = write_comparison(comparison, args.out)
        print(render_markdown(comparison))
        logger.info(f"written to {paths[0]} and {paths[1].name}")
        return 0
    print(f"compare_baselines: {problem}\n  → {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
