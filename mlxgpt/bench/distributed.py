"""Measures a training step of several ranks: of those that mlx.launch started, or of ranks on this
machine that share its cores, connected over loopback.
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

from mlxgpt.bench.records import Spread
from mlxgpt.bench.speed import COMPILING, ROOT
from mlxgpt.config import Config, from_tree, override
from mlxgpt.data.token_array import Tokens, dtype_for
from mlxgpt.distributed.group import ProcessGroup, joined
from mlxgpt.model.stats import count_parameters
from mlxgpt.training.step import TrainStep, new_step, take_steps
from mlxgpt.utils.errors import UserError

TIMES = ("ms_alone", "ms_share", "ms_step", "ms_halved")
CHILD = (sys.executable, "-m", "mlxgpt.bench.distributed")


@dataclass(frozen=True)
class Plan:
    """How much is measured: repeats of as many steps as take about `seconds`."""

    repeats: int = 5
    seconds: float = 2.0


@dataclass(frozen=True)
class Together:
    """Times of some ranks.

    Attributes:
        size: how many.
        hosts: their machines' names.
        sequences: of a step, all ranks' together.
        tokens: of a step.
        parameters: of the model, whose gradients are averaged in float32.
        ms_alone: of a step that the first rank takes alone, with all sequences.
        ms_share: of a rank's share, without the averaging; the slowest rank's.
        ms_step: of a step together.
        ms_halved: of a step together whose gradients are all-reduced in bfloat16.
    """

    size: int
    hosts: tuple[str, ...]
    sequences: int
    tokens: int
    parameters: int
    ms_alone: Spread
    ms_share: Spread
    ms_step: Spread
    ms_halved: Spread

    @property
    def efficiency(self) -> float:
        """As many tokens a second as one rank, for each rank."""
        return self.ms_alone.median / self.ms_step.median / self.size


def measure(group: ProcessGroup, config: Config, plan: Plan) -> Together | None:
    """Take steps alone, apart and together, in turns; the result is the first rank's.

    Args:
        config: with its vocabulary and dtype.
    """
    kinds: dict[str, TrainStep] = {
        "share": new_step(config, group=group.local()),
        "step": new_step(config, group=group),
        "halved": new_step(override(config, {"reduce_dtype": "bfloat16"}), group=group),
    }
    if group.is_main:
        kinds = {"alone": new_step(config), **kinds}
    vocabulary = config.model.vocab_size
    draw = np.random.default_rng(0).integers
    ids = draw(vocabulary, size=64 * config.tokens_per_step, dtype=dtype_for(vocabulary))
    tokens = Tokens(ids, vocabulary)

    def ms_of(kind: str, steps: int) -> float:
        """Of each of some steps, the slowest rank's; who does not take part waits, and is quiet."""
        group.barrier(f"before {kind}")
        ms = 0.0
        if kind in kinds:
            began = time.monotonic()
            take_steps(kinds[kind], tokens, config, steps)
            ms = 1000 * (time.monotonic() - began) / steps
        return max(group.gather(f"milliseconds of {kind}", ms))

    found: dict[str, list[float]] = {name: [] for name in ("alone", "share", "step", "halved")}
    steps = {}
    for kind in found:
        ms_of(kind, COMPILING)
        steps[kind] = max(1, math.ceil(1000 * plan.seconds / ms_of(kind, 1)))
    for _ in range(plan.repeats):
        for kind, times in found.items():
            times.append(ms_of(kind, steps[kind]))
    if not group.is_main:
        return None
    return Together(
        size=group.size,
        hosts=tuple(group.hosts),
        sequences=config.sequences_per_step,
        tokens=config.tokens_per_step,
        parameters=count_parameters(config.model),
        ms_alone=Spread.of(found["alone"]),
        ms_share=Spread.of(found["share"]),
        ms_step=Spread.of(found["step"]),
        ms_halved=Spread.of(found["halved"]),
    )


def on_loopback(config: Config, size: int, plan: Plan) -> Together:
    """Measure by so many ranks on this machine, each in a process with its share of the cores.

    Raises:
        UserError: if one of them fails.
    """
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        ports = []
        for _ in range(size):
            free = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(free.getsockname()[1])
        stack.close()
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        request = json.dumps({"config": asdict(config), "plan": asdict(plan)})
        cores = list(_cores(size))
        children = [
            subprocess.Popen(
                [*CHILD, request, *([cores[rank]] if cores else [])],
                env={
                    **os.environ,
                    **environment(rank, hosts, max(1, (os.cpu_count() or 1) // size)),
                },
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        ended = [child.communicate() for child in children]
    if any(child.returncode for child in children):
        said = "\n".join(error for _, error in ended).strip() or "a rank ended without a word"
        raise UserError(
            f"{size} ranks could not be measured: {said.splitlines()[-1]}",
            "see that `mlxgpt check` passes and that there is free memory, and try again.",
        )
    return together_from(json.loads(ended[0][0]))


def environment(rank: int, hosts: Path, threads: int) -> dict[str, str]:
    """What mlx.launch would leave a rank, and its number of BLAS's threads."""
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": str(threads)}


def _cores(size: int) -> Iterator[str]:
    """Each rank's cores, where a process can choose them."""
    if not hasattr(os, "sched_setaffinity"):
        return
    all_of_them = sorted(os.sched_getaffinity(0))
    for rank in range(size):
        yield ",".join(map(str, all_of_them[rank::size] or [all_of_them[rank % len(all_of_them)]]))


def together_from(tree: dict[str, Any]) -> Together:
    """A Together from its JSON."""

    def spread(tree: dict[str, Any]) -> Spread:
        return Spread(**{**tree, "repeats": tuple(tree["repeats"])})

    times = {name: spread(tree[name]) for name in TIMES}
    return Together(**{**tree, **times, "hosts": tuple(tree["hosts"])})


def told(found: Together) -> list[str]:
    """What was measured, a line each."""
    share, step = found.ms_share.median, found.ms_step.median
    return [
        f"{found.size} ranks on {', '.join(sorted(set(found.hosts)))}, {found.sequences} sequences "
        f"a step, {found.parameters:,} parameters",
        f"alone      {found.ms_alone.median:9,.1f} ms a step, all sequences on one rank",
        f"share      {share:9,.1f} ms, a rank's {found.sequences // found.size} sequences",
        f"averaging  {step - share:9,.1f} ms, of {4 * found.parameters / 1e6:,.1f} MB; none of it "
        "beside the computing",
        f"step       {step:9,.1f} ms together; {found.ms_halved.median:,.1f} with --reduce-dtype "
        "bfloat16",
        f"efficiency {found.efficiency:9.2f}",
    ]


def here(config: Config, plan: Plan) -> Together | None:
    """Measure with the ranks that this process was launched with; the result is the main rank's.

    Raises:
        UserError: if it was launched alone.
    """
    with joined() as group:
        if group.size == 1:
            raise UserError("there is one rank only", "start them with mlx.launch -n 2, or more.")
        return measure(group, config, plan)


def main() -> None:
    """A rank: takes a request, and its cores; the first prints a Together as JSON."""
    request = json.loads(sys.argv[1])
    if len(sys.argv) > 2:
        os.sched_setaffinity(0, {int(core) for core in sys.argv[2].split(",")})
    found = here(from_tree(request["config"]), Plan(**request["plan"]))
    if found:
        print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
