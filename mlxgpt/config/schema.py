"""Settings as fields of dataclasses: what each one means, its bounds, its type; and values that are
held against these.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from mlxgpt.utils.errors import UserError

T = TypeVar("T")

LARGEST = 1 << 53  # whole number, where there is no other bound


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    weights: bool = True,
) -> Any:
    """A dataclass field with its meaning, its bounds (inclusive), and whether it can change what
    a training ends with (`weights`).
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "weights": weights}
    return field(default=default, metadata=metadata)


def settings(section: type) -> Iterator[tuple[str, Any, Field[Any]]]:
    """(name, type, field) of each setting of one dataclass, in order."""
    types = get_type_hints(section)
    for item in fields(section):
        yield item.name, types[item.name], item


def checked(part: T) -> T:
    """`part` if each of its values is within the bounds of its field.

    Raises:
        UserError: naming the setting, and the nearest value that would do.
    """
    for name, kind, item in settings(type(part)):
        value, meta = getattr(part, name), item.metadata
        if value is None or kind in (bool, tuple[str, ...]):
            continue
        if meta["choices"] and value not in meta["choices"]:
            near = difflib.get_close_matches(str(value), meta["choices"], 1, 0.0)
            raise UserError(
                f"{name} = {value!r} is none of {', '.join(meta['choices'])}",
                f"did you mean {near[0]!r}?",
            )
        low, high = meta["low"], meta["high"]
        if high is None and isinstance(value, int):
            high = LARGEST
        if isinstance(value, float) and value != value:
            raise UserError(f"{name} = nan is not a number", f"leave out {name} for its default.")
        if low is not None and value < low:
            raise UserError(
                f"{name} = {value} is too small", f"the smallest possible value is {low}."
            )
        if high is not None and value > high:
            raise UserError(
                f"{name} = {value} is too large", f"the largest possible value is {high}."
            )
        if value == float("inf"):
            raise UserError(f"{name} = {value} is too large", "use a finite number.")
    return part


def typed(
    section: type, values: Mapping[str, Any], homes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`values` with each one brought to its field's type, where nothing is lost by it.

    Args:
        homes: the section that each setting is in, to name the right one.

    Raises:
        UserError: for an unknown name or another type.
    """
    kinds = {name: kind for name, kind, _ in settings(section)}
    result = {}
    for name, value in values.items():
        if name not in kinds:
            if home := (homes or {}).get(name):
                raise UserError(f"{name!r} stands in the wrong section", f"put it under [{home}].")
            raise unknown(f"setting {name!r}", name, kinds)
        result[name] = _convert(name, kinds[name], value)
    return result


def _convert(name: str, kind: Any, value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and (whole or (isinstance(value, float) and value.is_integer())):
        return int(value)
    if kind == int | None and (whole or value is None):
        return value
    if kind is float and (whole or isinstance(value, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # which is refused as too large
    if kind is str and isinstance(value, str):
        return value
    if kind == tuple[str, ...]:
        if isinstance(value, (str, Path)):
            return (str(value),)
        if isinstance(value, (list, tuple)) and all(isinstance(v, (str, Path)) for v in value):
            return tuple(str(v) for v in value)
    wanted = {
        bool: "true or false",
        int: "a whole number",
        int | None: "a whole number",
        float: "a number",
        str: "a text",
        tuple[str, ...]: "a text or a list of texts",
    }[kind]
    raise UserError(f"{name} = {value!r} has the wrong type", f"{name} takes {wanted}.")


def unknown(what: str, name: str, known: Mapping[str, Any]) -> UserError:
    """What to say of a name that is not known."""
    near = difflib.get_close_matches(name, list(known), 1, 0.0)[0]
    return UserError(f"unknown {what}", f"did you mean {near!r}?")
