"""Results of `mlxgpt bench` as plain data, and their JSON, from which a report can be rendered."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class SummaryStats:
    """One quantity, measured several times."""

    median: float
    least: float
    most: float
    repeats: tuple[float, ...]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> SummaryStats:
        return cls(statistics.median(values), min(values), max(values), tuple(values))

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> SummaryStats:
        """From its parsed JSON."""
        return cls(**{**tree, "repeats": tuple(tree["repeats"])})


@dataclass(frozen=True)
class TrainingSpeed:
    """Training's speed.

    Attributes:
        tokens_per_step: of the whole batch.
        plan_tokens: of the whole training, as the config plans it.
        flops_per_token: forward and backward.
        tokens_per_second: at the median of `ms_per_step`.
        matmul_peak: floating-point operations a second of a large matrix product.
        peak_share: of `matmul_peak`.
        peak_memory: bytes, and of what they are.
    """

    tokens_per_step: int
    plan_tokens: int
    flops_per_token: int
    warmup_steps: int
    steps_per_repeat: int
    ms_per_step: SummaryStats
    tokens_per_second: float
    matmul_peak: float
    peak_share: float
    peak_memory: int
    peak_memory_of: str


@dataclass(frozen=True)
class GenerationSpeed:
    """Generation's speed, one text at a time.

    Attributes:
        bytes_per_token: what decoding one token reads.
        tokens_per_second: after the first token.
    """

    prompt_tokens: int
    new_tokens: int
    bytes_per_token: int
    ms_to_first_token: SummaryStats
    tokens_per_second: SummaryStats


@dataclass(frozen=True)
class TierResult:
    """The measured speed of one config.

    Attributes:
        config: the whole of it, for the record.
    """

    name: str
    parameters: int
    dtype: str
    training: TrainingSpeed
    generation: GenerationSpeed
    config: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """The machine and the software of a measurement.

    Attributes:
        load: its load average of the minute before.
        bandwidth: bytes a second between the device and its memory, measured.
    """

    chip: str
    backend: str
    cores: int
    performance_cores: int | None
    memory: int
    system: str
    blas: str
    versions: dict[str, str]
    commit: str | None
    load: float
    bandwidth: float | None = None


# 1 lacks the bandwidth; 2 also holds kernel counts and other libraries, which are ignored.
MEASUREMENT_FORMAT = 3


@dataclass(frozen=True)
class Measurement:
    """The speed of some configs on a machine; `date` is in UTC."""

    date: str
    machine: Machine
    tiers: tuple[TierResult, ...]

    def to_json(self) -> str:
        tree = {"format": MEASUREMENT_FORMAT, **asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Read what `to_json` wrote.

        Raises:
            UserError: if it is something else.
        """
        try:
            tree = json.loads(text)
            if tree["format"] not in range(1, MEASUREMENT_FORMAT + 1):
                raise ValueError(f"its format is {tree['format']}, expected {MEASUREMENT_FORMAT}")
            tiers = tuple(parse_tier_result(tier) for tier in tree["tiers"])
            return cls(tree["date"], Machine(**tree["machine"]), tiers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is not a valid benchmark result: {error}", "create one: mlxgpt bench"
            ) from error


def parse_tier_result(tree: dict[str, Any]) -> TierResult:
    """A TierResult from its parsed JSON."""
    training, generation = dict(tree["training"]), dict(tree["generation"])
    training["ms_per_step"] = SummaryStats.from_tree(training["ms_per_step"])
    for name in ("ms_to_first_token", "tokens_per_second"):
        generation[name] = SummaryStats.from_tree(generation[name])
    speeds = {"training": TrainingSpeed(**training), "generation": GenerationSpeed(**generation)}
    tree.pop("counted", None)  # of format 2
    return TierResult(**{**tree, **speeds})
