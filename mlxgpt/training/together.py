"""A training by several ranks: what they agree on first, who decides, and what the others do.

Every rank takes the same steps on its share of each batch, and so has the same weights. The first
one reads and writes the run, decides, and tells how it goes. The others follow: they wait where it
is busy with that, take their part of evaluations, and compare their weights with its own.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from mlxgpt import __version__
from mlxgpt.backend import execution
from mlxgpt.config import Config
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.distributed.group import Ranks, join, sum_seconds
from mlxgpt.errors import UserError
from mlxgpt.machine import device
from mlxgpt.model.counting import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.beginning import Beginning
from mlxgpt.training.callback import Callback, Silent
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.saver import is_regular
from mlxgpt.training.shares import must_divide, shared
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import Hook

SOURCES = ("source", "val_source")  # where the text lies may differ; the data's hash tells
TRUST = "MLX sends without a password or encryption, so in a network that you trust only"


@contextlib.contextmanager
def joined(callback: Callback) -> Iterator[tuple[Ranks | None, Callback]]:
    """Those that train together, None where this process is alone; and whom to tell how it goes:
    nobody, but at the first rank. Where one of them ends with an error, all do.
    """
    ranks = join(callback.on_lost)
    if not ranks:
        yield None, callback
        return
    if not ranks.first:
        callback = Silent(callback)
    try:
        callback.on_note(f"{ranks.size} ranks, on {', '.join(ranks.hosts)}: {TRUST}")
        yield ranks, callback
    except UserError as error:
        ranks.refuse(error)
        raise
    ranks.close()


def in_turns(ranks: Ranks | None, prepare: Callable[[], Any]) -> Any:
    """What `prepare` gives on each rank, having been called by one rank of a machine at a time; and
    by the first rank before all others.
    """
    if not ranks:
        return prepare()
    host = ranks.hosts[ranks.rank]
    turn = 0 if ranks.first else 1 if ranks.hosts.index(host) == ranks.rank else 2
    result = None
    for now in range(3):
        if now == turn:
            result = prepare()
        ranks.meet()
    return result


def agree(ranks: Ranks, config: Config, dataset: Dataset, beginning: Beginning | None) -> None:
    """Refuse to train where a rank has other settings, data or versions than the first.

    Raises:
        UserError: on all of them, naming the rank and what differs.
    """
    must_divide(config.sequences_per_step, ranks.size)
    mine = {
        "mlxgpt": __version__,
        "mlx": version("mlx"),
        "computing on": device.backend(),
        "kernels": "not fused" if execution.compile_failure() else "fused",
        "data": f"{dataset.name} ({dataset.meta.fingerprint[:12]})",
        "beginning": dict(beginning.origin) if beginning else {},
        **{
            name: value
            for section in asdict(config).values()
            for name, value in section.items()
            if name not in SOURCES
        },
    }
    first, *others = ranks.gather(mine)
    differing = []
    for rank, theirs in enumerate(others, 1):
        if told := [
            f"{name} {theirs.get(name)} instead of {value}"
            for name, value in first.items()
            if theirs.get(name) != value
        ]:
            differing.append(f"{ranks.name(rank)} has {', '.join(told)}")
    if differing:
        raise UserError(
            f"not all machines train the same: {'; '.join(differing)}",
            "give all of them the same versions, settings and text; `mlxgpt prepare --verify` "
            "tells whether data is whole.",
        )


def forecast_together(ranks: Ranks, config: Config, own: Forecast) -> tuple[Forecast, str]:
    """The forecast for all ranks, of which the slowest decides, and a line on it.

    Args:
        own: of this rank's share, as if it were alone.
    """
    steps, peaks = zip(*ranks.gather((own.step_seconds, own.peak_bytes)), strict=True)
    numbers = count_parameters(config.model)
    dtype: mx.Dtype = getattr(mx, config.train.reduce_dtype)
    averaging = sum_seconds(ranks, numbers, dtype)
    whole = max(steps) + averaging
    line = (
        f"{ranks.size} ranks, {shared(config, ranks.size)}: {1000 * max(steps):,.0f} ms a step, "
        f"and {1000 * averaging:,.0f} ms to average {dtype.size * numbers / 1e6:,.1f} MB of "
        f"gradients, {averaging / whole:.0%} of all"
    )
    return replace(own, step_seconds=whole, peak_bytes=max(peaks)), line


def begin(
    ranks: Ranks,
    step_function: TrainStep,
    run: Run,
    start: int,
    guard: Mapping[str, Any],
    *,
    missing: bool = False,
) -> None:
    """At the first rank: give the others what there is to begin, or to go on, with.

    Args:
        guard: what a checkpoint keeps of it.
        missing: whether the evaluation of step `start` is made up for.
    """
    told = Told(asdict(run.config), run.bos, start, dict(guard), missing)
    ranks.spread(asdict(told))
    _same_state(ranks, step_function)


@dataclass(frozen=True)
class Told:
    """What the first rank has and the others need: see `begin`."""

    config: dict[str, Any]
    bos: int | None
    start: int
    guard: dict[str, Any]
    missing: bool


def told_to_begin(ranks: Ranks, step_function: TrainStep) -> Told:
    """At another rank: what there is to begin, or to go on, with."""
    told = Told(**ranks.spread())
    _same_state(ranks, step_function)
    return told


def _same_state(ranks: Ranks, step_function: TrainStep) -> None:
    parameters, optimizer = step_function.arrays()
    step_function.restore(ranks.spread_arrays(parameters), ranks.spread_arrays(optimizer))


def compare(ranks: Ranks, step_function: TrainStep, step: int) -> None:
    """Refuse to go on where ranks have other bits than the first.

    Raises:
        UserError: on all of them, naming the ranks.
    """
    first, *others = ranks.gather(fingerprint(step_function))
    if differing := [ranks.name(rank) for rank, one in enumerate(others, 1) if one != first]:
        raise UserError(
            f"after step {step:,} {', '.join(differing)} had other weights than {ranks.name(0)}",
            "the same command goes on from the last checkpoint, which all agreed on; where it "
            "happens again, train without that machine.",
        )


def fingerprint(step_function: TrainStep) -> str:
    """The sha256 of all that a step changes."""
    digest = hashlib.sha256()
    for arrays in step_function.arrays():
        mx.eval(arrays)
        for name, array in sorted(arrays.items()):
            digest.update(name.encode())
            digest.update(
                np.array(mx.contiguous(array), copy=False).reshape(-1).view(np.uint8).data
            )
    return digest.hexdigest()


def hooks(
    ranks: Ranks | None, step_function: TrainStep, config: Config, own: Sequence[Hook]
) -> list[Hook]:
    """A rank's own hooks, between a comparison and a wait for those of the others."""
    if not ranks:
        return list(own)
    regular = partial(is_regular, config)
    return [
        Hook(regular, lambda metrics: compare(ranks, step_function, metrics.step)),
        *own,
        Hook(regular, lambda metrics: ranks.meet()),
    ]
