"""Output helpers of the commands: results to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from mlxgpt.utils import json_files

EXIT_INTERRUPTED = 130  # 128 + SIGINT


def print_json(value: Any) -> int:
    """Print a value as JSON, with paths as strings. Returns the exit code 0."""
    # JSON escapes can express what the terminal's encoding lacks.
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    text = json.dumps(json_files.replace_nonfinite(value), default=str, ensure_ascii=ascii_only)
    # File names may contain bytes that are not UTF-8.
    print(text.encode("utf-8", "backslashreplace").decode())
    return 0


def write_stdout(piece: str) -> None:
    """Write text to stdout, and flush."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def print_stderr(line: str) -> None:
    """Print a message for the user to stderr."""
    print(line, file=sys.stderr)
