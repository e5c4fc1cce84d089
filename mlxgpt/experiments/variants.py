"""Variants of a comparison: configs with their datasets, made from the same text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxgpt.config import SECTION_BY_FIELD, SECTIONS, Config, override_config
from mlxgpt.config.fields import iter_fields
from mlxgpt.data.dataset import Dataset
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class Variant:
    """A config to compare, with its data.

    Attributes:
        config: config of its runs, except their length and seed.
        dataset: training data, with its held-out part as the validation split.
        full_dataset: dataset with the real validation split.
    """

    name: str
    config: Config
    dataset: Dataset
    full_dataset: Dataset


# Fields that the comparison itself sets, and why.
SET_BY_COMPARISON = {
    "seed": "all variants use the same seeds: set their number with --seeds",
    "max_steps": "it follows from the budget: use --budget",
}


def parse_vary(config: Config, text: str) -> dict[str, Config]:
    """Parse FIELD=VALUE,VALUE,… into configs by name; the first is the baseline.

    Raises:
        UserError: if the field does not exist, or there is nothing to compare.
    """
    field, equals, values = text.partition("=")
    field = field.strip().replace("-", "_")
    if not equals or "," not in values:
        raise UserError(
            f"--vary {text} has no values to compare", "use the form --vary dropout=0,0.1,0.2."
        )
    if field in SET_BY_COMPARISON:
        raise UserError(f"{field} cannot be varied", f"{SET_BY_COMPARISON[field]}.")
    configs = {}
    for value in map(str.strip, values.split(",")):
        configs[f"{field}={value}"] = override_config(config, {field: _parse_value(value)})
    if len(configs) < 2 or not weight_affecting_diff(*list(configs.values())[:2]):
        raise UserError(
            f"--vary {text}: all runs would end with the same weights",
            "use different values of a setting that affects the weights.",
        )
    return configs


def _parse_value(value: str) -> Any:
    try:
        return json.loads(value)  # numbers, true, false
    except ValueError:
        return value


def weight_affecting_diff(first: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that affect the weights and differ: {name: (first's value, other's value)}."""
    values, other_values = weight_affecting(first), weight_affecting(other)
    return {
        name: (values[name], other_values[name])
        for name in values
        if values[name] != other_values[name]
    }


def weight_affecting(config: Config) -> dict[str, Any]:
    """All settings that affect the weights of a run, except the sources of its data."""
    source_fields = ("source", "val_source")
    return {
        name: getattr(getattr(config, SECTION_BY_FIELD[name]), name)
        for section in SECTIONS.values()
        for name, _, field in iter_fields(section)
        if field.metadata["weights"] and name not in source_fields
    }


def check_same_text(variants: Sequence[Variant]) -> None:
    """Check that the variants use the same text.

    Raises:
        UserError: if their numbers of bytes or documents differ.
    """
    sizes = {
        v.name: (
            v.full_dataset.meta.train.bytes,
            v.full_dataset.meta.train.documents,
            v.full_dataset.meta.val.bytes,
        )
        for v in variants
    }
    if len(set(sizes.values())) > 1:
        raise UserError(
            "the variants have different datasets: "
            + ", ".join(f"{name} {size[0]:,} bytes" for name, size in sizes.items()),
            "use one dataset for all of them: --source SOURCE.",
        )


def format_diff(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Format differences between two configs as one line."""
    return ", ".join(f"{name} {new} ({old})" for name, (old, new) in differences.items())
