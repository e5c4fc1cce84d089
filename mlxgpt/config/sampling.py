"""Sampling parameters of text generation, with their defaults and help texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxgpt.config.fields import check_bounds, coerce_types, config_field


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of text generation; not part of a run's config."""

    max_tokens: int = config_field(500, "maximum number of tokens to generate", low=1)
    temperature: float = config_field(
        0.8, "sampling temperature; higher is more random; 0: greedy", low=0.0, high=100.0
    )
    top_k: int = config_field(0, "sample from the k most likely tokens; 0: all", low=0)
    top_p: float = config_field(
        1.0,
        "sample from the most likely tokens up to this total probability; 1: all",
        low=0.0,
        high=1.0,
    )
    min_p: float = config_field(
        0.0,
        "exclude tokens below this fraction of the highest probability; 0: none",
        low=0.0,
        high=1.0,
    )
    repetition_penalty: float = config_field(
        1.0, "above 1: make tokens that already occurred less likely; 1: off", low=0.01, high=100.0
    )
    seed: int | None = config_field(
        None, "random seed; default: a new one, which is printed", low=0, high=2**63 - 1
    )
    stop: tuple[str, ...] = config_field((), "stop before this text (repeatable)")
    samples: int = config_field(1, "number of samples to generate, in one batch", low=1)


def parse_sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """Build and validate sampling parameters from a mapping.

    Raises:
        UserError: for an unknown name or an invalid value.
    """
    return check_bounds(SamplingParams(**coerce_types(SamplingParams, values)))
