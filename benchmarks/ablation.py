"""What each part of the modern recipe is worth: all but one of them, each in turn, beside all.

    python benchmarks/ablation.py TEXT [--tokens 400k] [--seeds 5]     which of them help
    python benchmarks/ablation.py TEXT --times                         ms a step, in turn

On the stories of `modern.md`, at 2 layers of width 192: an hour and a half on two cores, and
minutes. What was trained is not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlxgpt  # before mlx
from mlxgpt import config_files
from mlxgpt.config import Config, override
from mlxgpt.machine import device
from mlxgpt.training.estimate import measure

SIZE: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 192,
    "n_head": 3,
    "vocab_size": 2048,
    "batch_size": 4,
}
# AdamW's rate is the classic's best at this length.
VARIANTS: dict[str, dict[str, Any]] = {
    "modern": {},
    "adamw": {"optimizer": "adamw", "learning_rate": 1.5e-3},
    "cosine": {"schedule": "cosine"},
    "gelu": {"mlp": "gelu"},
    "layer-norm": {"norm": "layer"},
    "learned-positions": {"position": "learned"},
    "no-embedding-norm": {"embedding_norm": False},
    "no-qk-norm": {"qk_norm": False},
    "no-weight-decay": {"weight_decay": 0.0},
    "one-adamw-rate": {"embedding_learning_rate": 0.0},
    "relu2": {"mlp": "relu2"},
    "tied": {"tied": True},
    "value-embeddings": {"value_embeddings": True},
}
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--tokens", default="400k")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--times", action="store_true")
    given = parser.parse_args()
    modern = override(config_files.tier(2, "modern"), SIZE)
    configs = {name: override(modern, changes) for name, changes in VARIANTS.items()}
    if given.times:
        print_times(configs, given.text)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.toml") for name in configs]
        for path, config in zip(paths, configs.values(), strict=True):
            path.write_text(config_files.to_toml(config), encoding="utf-8")
        line = ["compare", *map(str, paths), "--source", given.text]
        line += ["--budget", f"{given.tokens}tokens", "--seeds", str(given.seeds)]
        from mlxgpt import cli

        sys.exit(cli.main([*line, "--name", "stories-ablation"]))


def print_times(configs: dict[str, Config], text: str) -> None:
    """Milliseconds of a training step of each, measured in turn: a machine that slows down slows
    all.
    """
    data = mlxgpt.prepare(text, tokenizer="bpe", vocab_size=SIZE["vocab_size"])
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(ROUNDS):
        for name, config in configs.items():
            found = measure(device.resolve_dtype(config), data)
            times[name].append(1000 * found.step_seconds)
    first = statistics.median(next(iter(times.values())))
    print("| | ms a step | |\n|---|---|---|")
    for name, of_it in times.items():
        median = statistics.median(of_it)
        spread = f"{min(of_it):.0f} to {max(of_it):.0f}"
        print(f"| {name} | {median:.0f} ({spread}) | {median / first - 1:+.0%} |")


if __name__ == "__main__":
    main()
