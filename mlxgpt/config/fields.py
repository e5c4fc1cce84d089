"""Config fields: help texts, types and bounds, and validation of values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from mlxgpt.utils.errors import UserError

T = TypeVar("T")


def config_field(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    affects_weights: bool = True,
) -> Any:
    """Declare a dataclass field with its help text, inclusive bounds, and whether it can change the
    trained weights (`affects_weights`).
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "choices": choices,
        "weights": affects_weights,
    }
    return field(default=default, metadata=metadata)


def iter_fields(config_class: type) -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield (name, type, field) for each field of a config dataclass, in order."""
    types = get_type_hints(config_class)
    for item in fields(config_class):
        yield item.name, types[item.name], item


MAX_INT = 1 << 53  # upper bound of integers without their own bound: still exact as a float


def check_bounds(instance: T) -> T:
    """Check that each value is within the bounds of its field, and return `instance`.

    Raises:
        UserError: with the name of the setting and the nearest valid value.
    """
    for name, field_type, item in iter_fields(type(instance)):
        value, meta = getattr(instance, name), item.metadata
        if value is None or field_type in (bool, tuple[str, ...]):
            continue
        if meta["choices"] and value not in meta["choices"]:
            suggestions = difflib.get_close_matches(str(value), meta["choices"], 1, 0.0)
            raise UserError(
                f"{name} = {value!r} is not one of {', '.join(meta['choices'])}",
                f"did you mean {suggestions[0]!r}?",
            )
        low, high = meta["low"], meta["high"]
        if high is None and isinstance(value, int):
            high = MAX_INT
        if isinstance(value, float) and value != value:
            raise UserError(f"{name} = nan is not a number", f"omit {name} to use its default.")
        if low is not None and value < low:
            raise UserError(f"{name} = {value} is too small", f"the minimum is {low}.")
        if high is not None and value > high:
            raise UserError(f"{name} = {value} is too large", f"the maximum is {high}.")
        if value == float("inf"):
            raise UserError(f"{name} = {value} is too large", "use a finite number.")
    return instance


def coerce_types(
    config_class: type, values: Mapping[str, Any], section_by_field: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert each value to the type of its field, if the conversion is lossless.

    Args:
        section_by_field: section of each setting, used to suggest the right one.

    Raises:
        UserError: for an unknown name or a wrong type.
    """
    field_types = {name: field_type for name, field_type, _ in iter_fields(config_class)}
    result = {}
    for name, value in values.items():
        if name not in field_types:
            if right_section := (section_by_field or {}).get(name):
                raise UserError(
                    f"{name!r} is in the wrong section", f"move it to [{right_section}]."
                )
            raise unknown_name_error(f"setting {name!r}", name, field_types)
        result[name] = _convert(name, field_types[name], value)
    return result


def _convert(name: str, field_type: Any, value: Any) -> Any:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if field_type is bool and isinstance(value, bool):
        return value
    if field_type is int and (is_int or (isinstance(value, float) and value.is_integer())):
        return int(value)
    if field_type == int | None and (is_int or value is None):
        return value
    if field_type is float and (is_int or isinstance(value, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # rejected later as too large
    if field_type is str and isinstance(value, str):
        return value
    if field_type == tuple[str, ...]:
        if isinstance(value, (str, Path)):
            return (str(value),)
        if isinstance(value, (list, tuple)) and all(isinstance(v, (str, Path)) for v in value):
            return tuple(str(v) for v in value)
    expected = {
        bool: "true or false",
        int: "an integer",
        int | None: "an integer",
        float: "a number",
        str: "a string",
        tuple[str, ...]: "a string or a list of strings",
    }[field_type]
    raise UserError(f"{name} = {value!r} has the wrong type", f"{name} must be {expected}.")


def unknown_name_error(description: str, name: str, valid_names: Mapping[str, Any]) -> UserError:
    """The error for an unknown name, suggesting the closest valid one."""
    suggestion = difflib.get_close_matches(name, list(valid_names), 1, 0.0)[0]
    return UserError(f"unknown {description}", f"did you mean {suggestion!r}?")
