"""Read and write JSON: plain, and with a checksum that detects any change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


def read_json(path: Path, max_bytes: int = files.MAX_SMALL_FILE_BYTES) -> Any:
    """Read a small JSON file, which may start with a byte-order mark.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `max_bytes` bytes, or not JSON.
    """
    return parse_json(files.read_small(path, max_bytes).removeprefix("\ufeff"))


def replace_nonfinite(tree: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None in a tree of values."""
    if isinstance(tree, dict):
        return {name: replace_nonfinite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [replace_nonfinite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def parse_json(text: str) -> Any:
    """Parse JSON, and raise ValueError for too deep nesting, and for integers that no float can
    hold, unlike `json.loads`.
    """
    with recursion_error_as_value_error():
        return json.loads(text, parse_int=_parse_int)


def _parse_int(text: str) -> int:
    number = int(text)
    try:
        float(number)
    except OverflowError:
        raise ValueError(f"a number has {len(text)} digits") from None
    return number


@contextlib.contextmanager
def recursion_error_as_value_error() -> Iterator[None]:
    """Convert the RecursionError of a parser, from too deep nesting, to ValueError."""
    try:
        yield
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


CHECKSUM_KEY = "seal"  # key of the checksum in JSON files


def dump_checksummed(tree: Mapping[str, Any]) -> str:
    """Serialize a JSON object with its checksum."""
    return json.dumps({**tree, CHECKSUM_KEY: _checksum(tree)}, indent=1) + "\n"


def read_checksummed(path: Path, max_format: int) -> dict[str, Any]:
    """Read a file written by `dump_checksummed`, without the checksum. Detects any changed byte,
    even in whitespace: the file must be exactly what `dump_checksummed` would write.

    Args:
        max_format: the newest supported `format`.

    Raises:
        UserError: if it was written by a newer mlxgpt.
        OSError: if it cannot be read.
        ValueError: if it was modified.
    """
    text = files.read_small(path)
    tree = parse_json(text)
    if not isinstance(tree, dict):
        raise ValueError("it is not a JSON object")
    check_format(tree, max_format, str(path.parent))
    tree.pop(CHECKSUM_KEY, None)
    with recursion_error_as_value_error():
        if dump_checksummed(tree) != text:
            raise ValueError("it was modified (checksum mismatch)")
    return tree


def check_format(tree: Mapping[str, Any], max_format: int, description: str) -> None:
    """Check that the `format` of a JSON object, if it has one, is supported.

    Args:
        description: of the file, for the error message.

    Raises:
        UserError: if it is newer than `max_format`.
    """
    file_format = tree.get("format")
    if isinstance(file_format, int) and file_format > max_format:
        raise UserError(
            f"{description} was written by a newer mlxgpt (format {file_format})",
            "update mlxgpt, or use the version that wrote it.",
        )


def _checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
