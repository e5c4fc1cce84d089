"""What MLX's engine does with gradients of Tier 2's shape: one array, array by array, as
nn.average_gradients groups them; compiled; with ranks that come late; and whether all get the same
bits.

    mlx.launch -n 4 -- python benchmarks/sums.py [--rounds 20] [--late 0.05]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxgpt import config, config_files
from mlxgpt.model.gpt import GPT
from mlxgpt.model.parameters import flatten_params

Gradients = dict[str, mx.array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--late", type=float, default=0.0, help="share of rounds begun late")
    given = parser.parse_args()
    group = mx.distributed.init()
    tier = config.override(config_files.tier(2), {"dtype": "float32"})
    parameters = flatten_params(GPT(tier.model).parameters())
    keys = mx.random.split(mx.random.key(group.rank()), len(parameters))
    named = zip(parameters.items(), keys, strict=True)
    gradients = {name: mx.random.normal(p.shape, key=key) for (name, p), key in named}
    mx.eval(gradients)
    draw = random.Random(group.rank())
    if group.rank() == 0:
        count = sum(g.size for g in gradients.values())
        print(f"{group.size()} ranks, {count:,} numbers in {len(gradients)} arrays", flush=True)
    for name, way in WAYS.items():
        times = []
        for _ in range(given.rounds):
            if draw.random() < given.late:
                time.sleep(draw.uniform(0, 1))
            began = time.perf_counter()
            mx.eval(found := way(gradients))
            times.append(1000 * (time.perf_counter() - began))
        digest = hashlib.sha256(b"".join(np.array(g).tobytes() for g in found.values())).digest()
        words = mx.array(np.frombuffer(digest[:8], np.uint8).astype(np.float32))
        same = bool((mx.distributed.all_sum(words) == group.size() * words).all())
        if group.rank() == 0:
            print(
                f"{name:22} {statistics.median(times):8,.0f} ms ({min(times):,.0f} to "
                f"{max(times):,.0f}), {'the same bits' if same else 'OTHER BITS'}",
                flush=True,
            )


def one_array(gradients: Gradients) -> Gradients:
    packed = mx.concatenate([g.reshape(-1) for g in gradients.values()])
    total = mx.distributed.all_sum(packed)
    ends = np.cumsum([g.size for g in gradients.values()])[:-1].tolist()
    pieces = zip(gradients.items(), mx.split(total, ends), strict=True)
    return {name: piece.reshape(g.shape) for (name, g), piece in pieces}


def array_by_array(gradients: Gradients) -> Gradients:
    return {name: mx.distributed.all_sum(g) for name, g in gradients.items()}


def average_gradients(gradients: Gradients) -> Gradients:
    return flatten_params(nn.average_gradients(tree_unflatten(gradients)))


WAYS: dict[str, Callable[[Gradients], Gradients]] = {
    "one array": one_array,
    "one array, compiled": mx.compile(one_array),
    "average_gradients": average_gradients,
    "the same, compiled": mx.compile(average_gradients),
    "array by array": array_by_array,
}

if __name__ == "__main__":
    main()
