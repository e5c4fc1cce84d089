"""What every command prints with: results to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from mlxgpt.utils import files

EXIT_INTERRUPTED = 130  # 128 + SIGINT


def print_json(value: Any) -> int:
    """Print a value as JSON, paths as strings; the exit code 0."""
    # JSON can escape what the terminal's encoding lacks.
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    text = json.dumps(files.replace_nonfinite(value), default=str, ensure_ascii=ascii_only)
    # Bytes of a file name that are not UTF-8 are escaped, too.
    print(text.encode("utf-8", "backslashreplace").decode())
    return 0


def write_stdout(piece: str) -> None:
    """Write a piece of text to stdout at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def print_stderr(line: str) -> None:
    """Print a line for the user, which is not the result."""
    print(line, file=sys.stderr)
