"""Results of `mlxgpt bench` as dataclasses, and their JSON format."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxgpt.utils import json_files
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class SummaryStats:
    """Summary of repeated measurements of one quantity."""

    median: float
    least: float
    most: float
    repeats: tuple[float, ...]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> SummaryStats:
        return cls(statistics.median(values), min(values), max(values), tuple(values))

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> SummaryStats:
        """Convert from parsed JSON."""
        return cls(**{**tree, "repeats": tuple(tree["repeats"])})


@dataclass(frozen=True)
class TrainingSpeed:
    """Training speed.

    Attributes:
        tokens_per_step: of the whole batch.
        plan_tokens: tokens of the full training run in the config.
        flops_per_token: forward and backward.
        tokens_per_second: at the median of `ms_per_step`.
        matmul_peak: measured FLOPs per second of a large matrix product.
        peak_share: fraction of `matmul_peak` that training reaches.
        peak_memory: bytes; `peak_memory_of` names what was counted.
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
    """Generation speed at batch size 1.

    Attributes:
        bytes_per_token: bytes read to decode one token.
        tokens_per_second: after the first token.
    """

    prompt_tokens: int
    new_tokens: int
    bytes_per_token: int
    ms_to_first_token: SummaryStats
    tokens_per_second: SummaryStats


@dataclass(frozen=True)
class TierResult:
    """Measured speed of one config, with the full config for the record."""

    name: str
    parameters: int
    dtype: str
    training: TrainingSpeed
    generation: GenerationSpeed
    config: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Machine and software of a measurement.

    Attributes:
        load: load average over the minute before.
        bandwidth: measured memory bandwidth in bytes per second.
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


# Format 1 lacks the bandwidth; 2 also has kernel counts and other libraries, which are ignored.
MEASUREMENT_FORMAT = 3


@dataclass(frozen=True)
class Measurement:
    """Measured speed of several configs on one machine; `date` is in UTC."""

    date: str
    machine: Machine
    tiers: tuple[TierResult, ...]

    def to_json(self) -> str:
        tree = {"format": MEASUREMENT_FORMAT, **asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Parse the output of `to_json`.

        Raises:
            UserError: if it is not a valid benchmark result, or in a newer format.
        """
        try:
            tree = json.loads(text)
            json_files.check_format(tree, MEASUREMENT_FORMAT, "this benchmark result")
            if tree["format"] not in range(1, MEASUREMENT_FORMAT + 1):
                raise ValueError(f"its format is {tree['format']}, expected {MEASUREMENT_FORMAT}")
            tiers = tuple(parse_tier_result(tier) for tier in tree["tiers"])
            return cls(tree["date"], Machine(**tree["machine"]), tiers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is not a valid benchmark result: {error}", "create one: mlxgpt bench"
            ) from error


def parse_tier_result(tree: dict[str, Any]) -> TierResult:
    """Convert parsed JSON to a TierResult."""
    training, generation = dict(tree["training"]), dict(tree["generation"])
    training["ms_per_step"] = SummaryStats.from_tree(training["ms_per_step"])
    for name in ("ms_to_first_token", "tokens_per_second"):
        generation[name] = SummaryStats.from_tree(generation[name])
    speeds = {"training": TrainingSpeed(**training), "generation": GenerationSpeed(**generation)}
    tree.pop("counted", None)  # only in format 2
    return TierResult(**{**tree, **speeds})
