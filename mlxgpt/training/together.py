"""A training by several ranks: what they agree on first, who decides, and what the others do.

Every rank takes the same steps on its share of each batch, and so has the same weights. The first
one reads and writes the run, decides, and tells how it goes. The others follow: they wait where it
is busy with that, take their part of evaluations, and compare their weights with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from mlxgpt import __version__
from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.config import Config
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.distributed import agreement
from mlxgpt.distributed.group import ProcessGroup, measure_average_seconds
from mlxgpt.machine import device
from mlxgpt.model.counting import count_parameters
from mlxgpt.storage.run import Run
from mlxgpt.training.beginning import Beginning
from mlxgpt.training.forecast import Forecast
from mlxgpt.training.saver import is_regular
from mlxgpt.training.shares import must_divide, shared
from mlxgpt.training.step import TrainStep
from mlxgpt.training.trainer import Hook, Metrics

SOURCES = ("source", "val_source")  # where the text lies may differ; the data's hash tells


def agree(
    group: ProcessGroup, config: Config, dataset: Dataset, beginning: Beginning | None
) -> None:
    """Refuse to train where a rank has other settings, data or versions than the first.

    Raises:
        UserError: on all of them, naming the rank and what differs.
    """
    must_divide(config.sequences_per_step, group.size)
    values = {
        "mlxgpt": __version__,
        "mlx": version("mlx"),
        "computing on": device.backend(),
        "kernels": "not fused" if compiler.status() else "fused",
        "data": f"{dataset.name} ({dataset.meta.fingerprint[:12]})",
        "beginning": dict(beginning.origin) if beginning else {},
        **{
            name: value
            for section in asdict(config).values()
            for name, value in section.items()
            if name not in SOURCES
        },
    }
    agreement.require_same(group, "settings", values)


def forecast_together(group: ProcessGroup, config: Config, own: Forecast) -> tuple[Forecast, str]:
    """The forecast for all ranks, of which the slowest decides, and a line on it.

    Args:
        own: of this rank's share, as if it were alone.
    """
    steps, peaks = zip(*group.gather("estimates", (own.step_seconds, own.peak_bytes)), strict=True)
    numbers = count_parameters(config.model)
    dtype: mx.Dtype = getattr(mx, config.train.reduce_dtype)
    averaging = measure_average_seconds(group, numbers, dtype)
    whole = max(steps) + averaging
    line = (
        f"{group.size} ranks, {shared(config, group.size)}: {1000 * max(steps):,.0f} ms a step, "
        f"and {1000 * averaging:,.0f} ms to average {dtype.size * numbers / 1e6:,.1f} MB of "
        f"gradients, {averaging / whole:.0%} of all"
    )
    return replace(own, step_seconds=whole, peak_bytes=max(peaks)), line


def begin(
    group: ProcessGroup,
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
    group.broadcast("start", asdict(told))
    _same_state(group, step_function)


@dataclass(frozen=True)
class Told:
    """What the first rank has and the others need: see `begin`."""

    config: dict[str, Any]
    bos: int | None
    start: int
    guard: dict[str, Any]
    missing: bool


def told_to_begin(group: ProcessGroup, step_function: TrainStep) -> Told:
    """At another rank: what there is to begin, or to go on, with."""
    told = Told(**group.broadcast("start"))
    _same_state(group, step_function)
    return told


def _same_state(group: ProcessGroup, step_function: TrainStep) -> None:
    if group.size == 1:
        return
    parameters, optimizer = step_function.arrays()
    step_function.restore(
        group.broadcast_arrays("parameters", parameters),
        group.broadcast_arrays("optimizer", optimizer),
    )


def hooks(
    group: ProcessGroup, step_function: TrainStep, config: Config, own: Sequence[Hook]
) -> list[Hook]:
    """A rank's own hooks, between a comparison and a wait for those of the others."""
    if group.size == 1:
        return list(own)
    regular = partial(is_regular, config)

    def compare(metrics: Metrics) -> None:
        agreement.require_same_arrays(group, metrics.step, *step_function.arrays())

    return [
        Hook(regular, compare),
        *own,
        Hook(regular, lambda metrics: group.barrier("after saving")),
    ]
