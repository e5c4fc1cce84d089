"""What a link between machines costs a training, and so what another machine brings: a model of it,
and what that *predicts*.

A step of N machines takes as long as one machine's share of the batch, and then as the averaging of
the gradients and of the loss, which nothing overlaps. MLX's ring sends every byte 2 (N - 1) / N
times through each machine's link, in 2 (N - 1) turns, and copies and adds meanwhile. How long that
takes was measured, and fitted: benchmarks/distributed.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mlxgpt.config import Config, override
from mlxgpt.model.counting import count_parameters, flops_per_token
from mlxgpt.reports.chips import PEAK_SHARE, Chip
from mlxgpt.reports.markdown import table

MACHINES = (2, 4, 8, 16, 32, 64)
UPDATE_BYTES = 28  # read and written for each parameter by AdamW: gradient, two moments, weight


@dataclass(frozen=True)
class Link:
    """What connects each machine to the others.

    Attributes:
        bits: a second, in each direction.
        turn: seconds that it adds to each turn of the ring.
    """

    name: str
    bits: float
    turn: float


# Rates as they are named; what is left of them for data is in SHARE.
LINKS = (
    Link("Wi-Fi", 0.3e9, 3e-3),
    Link("1 Gb Ethernet", 1e9, 2e-4),
    Link("10 Gb Ethernet", 10e9, 1e-4),
    Link("Thunderbolt", 20e9, 1e-4),
)


@dataclass(frozen=True)
class Costs:
    """The model's numbers.

    Attributes:
        share: of a link's rate that data gets.
        byte: seconds for each byte of gradients that a machine copies and adds, whatever the link.
        turn: seconds of each turn, whatever the link.
        crowded: seconds of each turn more, where ranks share cores, as they do where this was
            measured and machines do not.
    """

    share: float
    byte: float
    turn: float
    crowded: float = 0.0


# Fitted on two Linux cores: benchmarks/distributed.md.
FITTED = Costs(share=0.951, byte=1.2e-10, turn=0.0, crowded=3.5e-3)


def sum_seconds(size: int, nbytes: float, link: Link, costs: Costs = FITTED) -> float:
    """Of the sum of an array of so many bytes over `size` machines."""
    sent = 2 * (size - 1) / size * nbytes
    turns = 2 * (size - 1)
    return sent * (8 / (costs.share * link.bits) + costs.byte) + turns * (link.turn + costs.turn)


def averaging_seconds(size: int, config: Config, link: Link, costs: Costs = FITTED) -> float:
    """Of a step's gradients, and of its loss, which is a sum of its own."""
    width = 2 if config.train.reduce_dtype == "bfloat16" else 4
    gradients = width * count_parameters(config.model)
    return sum_seconds(size, gradients, link, costs) + sum_seconds(size, 8, link, costs)


def share_seconds(chip: Chip, config: Config, sequences: float) -> float:
    """What a chip takes for so many sequences of a step, *predicted*: its operations, and the
    update, which every machine does.
    """
    tokens = sequences * config.model.block_size
    operations = tokens * flops_per_token(config.model) / (PEAK_SHARE * 1e12 * chip.tflops)
    bandwidth = 1e9 * chip.gb_per_second[0]
    return operations + UPDATE_BYTES * count_parameters(config.model) / bandwidth


def brought(
    chip: Chip, config: Config, link: Link, size: int, *, grown: bool, costs: Costs = FITTED
) -> float | None:
    """How many times as many tokens a second as one some machines bring; None where there are fewer
    sequences than machines.

    Args:
        grown: each machine has as many sequences as one alone would have; else all share these.
    """
    rows = config.sequences_per_step
    if not grown and size > rows:
        return None
    own = share_seconds(chip, config, rows if grown else rows / size)
    seconds = own + averaging_seconds(size, config, link, costs)
    return (size if grown else 1) * share_seconds(chip, config, rows) / seconds


def worth(chip: Chip, config: Config, link: Link, *, grown: bool, costs: Costs = FITTED) -> int:
    """From how many machines on another one brings less than half of itself; 1: the second."""

    def times(size: int) -> float:
        return brought(chip, config, link, size, grown=grown, costs=costs) or 0.0

    size, most = 1, _most(config, grown)
    while size < most and times(size + 1) - times(size) >= 0.5:
        size += 1
    return size


def _most(config: Config, grown: bool) -> int:
    return MACHINES[-1] if grown else min(config.sequences_per_step, MACHINES[-1])


def predicted(
    chip: Chip, configs: dict[str, Config], links: Sequence[Link] = LINKS, costs: Costs = FITTED
) -> list[str]:
    """The table for some configs, as Markdown."""
    rows = [["", "link", "batch", *(f"{size}" for size in MACHINES), "less than half from"]]
    for name, given in configs.items():
        halved = override(given, {"reduce_dtype": "bfloat16"})
        kinds = {"fixed": (given, False), "16 bits": (halved, False), "grown": (given, True)}
        for link, (kind, (config, grown)) in product(links, kinds.items()):
            found = [
                brought(chip, config, link, size, grown=grown, costs=costs) for size in MACHINES
            ]
            times = [f"{one:.1f}" if one else "–" for one in found]
            until = worth(chip, config, link, grown=grown, costs=costs)
            end = "–" if until == _most(config, grown) else f"{until + 1}"
            rows.append([name, link.name, kind, *times, end])
    return table(rows, ">")


def fit(observed: Sequence[tuple[int, int, float, float]], cores: int) -> Costs:
    """The costs under which the model comes closest, in proportion, to what was measured.

    Args:
        observed: (ranks, bytes, bits a second, seconds) of sums.
        cores: that all ranks had together.
    """
    import numpy as np

    def row(size: int, nbytes: int, bits: float) -> list[float]:
        sent, turns = 2 * (size - 1) / size * nbytes, 2.0 * (size - 1)
        return [8 * sent / bits, sent, turns, turns if size > cores else 0.0]

    seconds = np.array([one[3] for one in observed])
    matrix = np.array([row(*one[:3]) for one in observed]) / seconds[:, None]
    active = [column for column in range(4) if matrix[:, column].any()]
    while True:  # a cost is not below nothing
        found, *_ = np.linalg.lstsq(matrix[:, active], np.ones(len(seconds)), rcond=None)
        if (found >= 0).all():
            break
        active.remove(active[int(found.argmin())])
    wire, *others = (float(found[active.index(n)]) if n in active else 0.0 for n in range(4))
    return Costs(1 / wire if wire else 1.0, *others)


def markdown(chip: Chip, configs: dict[str, Config]) -> list[str]:
    """The section on what machines of a chip are predicted to bring."""
    return [
        f"## How many times as fast 2 to 64 Macs with an {chip.name} should train: *predicted*",
        "",
        "Nothing here was measured on Macs: computing as `mlxgpt bench` predicts it, and averaging",
        "as it was measured on Linux and fitted (benchmarks/distributed.md). *Fixed*: the config's",
        "batch, shared out. *16 bits*: the same with --reduce-dtype bfloat16. *Grown*: each",
        "machine has a batch as large as that. *Less than half from*: the machine that would bring",
        "less than half of itself.",
        "",
        *predicted(chip, configs),
    ]
