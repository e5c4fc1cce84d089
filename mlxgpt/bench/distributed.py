"""Benchmark of a distributed training step, on the ranks that mlx.launch started or on local ranks
that share this machine's cores and communicate over loopback.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mlxgpt.bench.records import SummaryStats
from mlxgpt.bench.speed import PACKAGE_ROOT, WARMUP_STEPS
from mlxgpt.config import Config, config_from_tree, override_config
from mlxgpt.data.token_array import TokenArray, dtype_for
from mlxgpt.distributed.group import ProcessGroup, init_process_group
from mlxgpt.model.stats import count_parameters
from mlxgpt.training.step import TrainStep, make_train_step, take_steps
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class DistributedBenchPlan:
    """How much to measure: `repeats`, each of as many steps as take about `seconds`."""

    repeats: int = 5
    seconds: float = 2.0


@dataclass(frozen=True)
class DistributedTiming:
    """Timing of a distributed training step.

    Attributes:
        size: number of ranks.
        hosts: host name of each rank.
        sequences: per step, over all ranks.
        tokens: per step, over all ranks.
        parameters: number of parameters, whose gradients are all-reduced in float32.
        ms_alone: a step of the main rank alone, with all sequences.
        ms_share: the slowest rank's share of a step, without the all-reduce.
        ms_step: a step of all ranks.
        ms_halved: a step of all ranks with gradients all-reduced in bfloat16.
    """

    size: int
    hosts: tuple[str, ...]
    sequences: int
    tokens: int
    parameters: int
    ms_alone: SummaryStats
    ms_share: SummaryStats
    ms_step: SummaryStats
    ms_halved: SummaryStats

    @property
    def efficiency(self) -> float:
        """Scaling efficiency: tokens per second and rank, relative to one rank alone."""
        return self.ms_alone.median / self.ms_step.median / self.size


def measure_distributed_step(
    group: ProcessGroup, config: Config, plan: DistributedBenchPlan
) -> DistributedTiming | None:
    """Time steps of the main rank alone, of each rank's share and of all ranks, in turn; None on
    the non-main ranks.

    Args:
        config: with `vocab_size` and `dtype` resolved.
    """
    halved_config = override_config(config, {"reduce_dtype": "bfloat16"})
    train_steps: dict[str, TrainStep] = {
        "share": make_train_step(config, group=group.local_group()),
        "step": make_train_step(config, group=group),
        "halved": make_train_step(halved_config, group=group),
    }
    if group.is_main:
        train_steps = {"alone": make_train_step(config), **train_steps}
    vocab_size = config.model.vocab_size
    random_integers = np.random.default_rng(0).integers
    ids = random_integers(vocab_size, size=64 * config.tokens_per_step, dtype=dtype_for(vocab_size))
    tokens = TokenArray(ids, vocab_size)

    def measure_ms(kind: str, steps: int) -> float:
        """Milliseconds per step of the slowest rank; ranks without this kind wait at a barrier."""
        group.barrier(f"before {kind}")
        ms = 0.0
        if kind in train_steps:
            start_time = time.monotonic()
            take_steps(train_steps[kind], tokens, config, steps)
            ms = 1000 * (time.monotonic() - start_time) / steps
        return max(group.gather(f"milliseconds of {kind}", ms))

    kinds = ("alone", "share", "step", "halved")
    times_by_kind: dict[str, list[float]] = {kind: [] for kind in kinds}
    steps = {}
    for kind in kinds:
        measure_ms(kind, WARMUP_STEPS)
        steps[kind] = max(1, math.ceil(1000 * plan.seconds / measure_ms(kind, 1)))
    for _ in range(plan.repeats):
        for kind, times in times_by_kind.items():
            times.append(measure_ms(kind, steps[kind]))
    if not group.is_main:
        return None
    return DistributedTiming(
        size=group.size,
        hosts=tuple(group.hosts),
        sequences=config.sequences_per_step,
        tokens=config.tokens_per_step,
        parameters=count_parameters(config.model),
        ms_alone=SummaryStats.from_values(times_by_kind["alone"]),
        ms_share=SummaryStats.from_values(times_by_kind["share"]),
        ms_step=SummaryStats.from_values(times_by_kind["step"]),
        ms_halved=SummaryStats.from_values(times_by_kind["halved"]),
    )


RANK_COMMAND = (sys.executable, "-m", "mlxgpt.bench.distributed")


def measure_on_loopback(config: Config, size: int, plan: DistributedBenchPlan) -> DistributedTiming:
    """Measure with `size` ranks on this machine, each in a process with its share of the cores.

    Raises:
        UserError: if a rank fails.
    """
    with TemporaryDirectory() as temp_dir, ExitStack() as stack:
        ports = []
        for _ in range(size):
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(server.getsockname()[1])
        stack.close()
        hostfile = Path(temp_dir) / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        request = json.dumps({"config": asdict(config), "plan": asdict(plan)})
        cores = list(_assign_cores(size))
        threads = max(1, (os.cpu_count() or 1) // size)
        children = [
            subprocess.Popen(
                [*RANK_COMMAND, request, *([cores[rank]] if cores else [])],
                env={**os.environ, **rank_environment(rank, hostfile, threads)},
                cwd=PACKAGE_ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        outputs = [child.communicate() for child in children]
    if any(child.returncode for child in children):
        reason = (
            "\n".join(error for _, error in outputs).strip()
            or "a rank exited without an error message"
        )
        raise UserError(
            f"benchmarking {size} ranks failed: {reason.splitlines()[-1]}",
            "make sure that `mlxgpt check` passes and that enough memory is free, then try again.",
        )
    return parse_distributed_timing(json.loads(outputs[0][0]))


def rank_environment(rank: int, hostfile: Path, threads: int) -> dict[str, str]:
    """Environment variables that mlx.launch sets for a rank, and the number of BLAS threads."""
    return {
        "MLX_RANK": str(rank),
        "MLX_HOSTFILE": str(hostfile),
        "OPENBLAS_NUM_THREADS": str(threads),
    }


def _assign_cores(size: int) -> Iterator[str]:
    """The cores of each rank, if the system supports CPU affinity."""
    if not hasattr(os, "sched_setaffinity"):
        return
    all_cores = sorted(os.sched_getaffinity(0))
    for rank in range(size):
        yield ",".join(map(str, all_cores[rank::size] or [all_cores[rank % len(all_cores)]]))


TIMING_FIELDS = ("ms_alone", "ms_share", "ms_step", "ms_halved")


def parse_distributed_timing(tree: dict[str, Any]) -> DistributedTiming:
    """Convert parsed JSON to a DistributedTiming."""
    times = {name: SummaryStats.from_tree(tree[name]) for name in TIMING_FIELDS}
    return DistributedTiming(**{**tree, **times, "hosts": tuple(tree["hosts"])})


def format_distributed_timing(timing: DistributedTiming) -> list[str]:
    """Format a timing as lines of text."""
    share, step = timing.ms_share.median, timing.ms_step.median
    return [
        f"{timing.size} ranks on {', '.join(sorted(set(timing.hosts)))}, "
        f"{timing.sequences} sequences per step, {timing.parameters:,} parameters",
        f"one rank   {timing.ms_alone.median:9,.1f} ms per step, all sequences",
        f"compute    {share:9,.1f} ms, {timing.sequences // timing.size} sequences per rank",
        f"all-reduce {step - share:9,.1f} ms, {4 * timing.parameters / 1e6:,.1f} MB, not "
        "overlapped with compute",
        f"step       {step:9,.1f} ms in total; {timing.ms_halved.median:,.1f} with --reduce-dtype "
        "bfloat16",
        f"efficiency {timing.efficiency:9.2f}",
    ]


def measure_on_launched_ranks(
    config: Config, plan: DistributedBenchPlan
) -> DistributedTiming | None:
    """Measure with the ranks that mlx.launch started; None on the non-main ranks.

    Raises:
        UserError: if there is only one rank.
    """
    with init_process_group() as group:
        if group.size == 1:
            raise UserError(
                "there is only one rank", "start the benchmark with mlx.launch -n 2 or more."
            )
        return measure_distributed_step(group, config, plan)


def run_rank() -> None:
    """Entry point of a rank: measure the request in argv[1], on the cores in argv[2] if given. The
    main rank prints a DistributedTiming as JSON.
    """
    request = json.loads(sys.argv[1])
    if len(sys.argv) > 2:
        os.sched_setaffinity(0, {int(core) for core in sys.argv[2].split(",")})
    timing = measure_on_launched_ranks(
        config_from_tree(request["config"]), DistributedBenchPlan(**request["plan"])
    )
    if timing:
        print(json.dumps(asdict(timing)))


if __name__ == "__main__":
    run_rank()
