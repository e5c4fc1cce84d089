"""The Python file in which a reader of the course writes functions."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from mlxgpt.utils.errors import UserError


def load_functions(path: Path) -> dict[str, Any]:
    """The functions that a Python file defines or imports, by name.

    Raises:
        UserError: if the file cannot be read or run.
    """
    try:
        path.read_bytes()  # an OSError below is one of the reader's code
    except OSError as error:
        raise UserError(
            f"{path} could not be read: {error.strerror}",
            "write your functions to my_gpt.py, or name another file with --file.",
        ) from error
    sys.path.insert(0, str(path.parent))  # as if it were run as a script
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the reader's code may raise anything
        raise UserError(
            f"{path} does not run: {describe_error(error)}", "correct it, then check again."
        ) from error
    finally:
        sys.path.remove(str(path.parent))


def describe_error(error: BaseException) -> str:
    """Type, message and place of an error, in one line."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError in line {error.lineno}: {error.msg}"
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    problem = ": ".join([type(error).__name__, *" ".join(str(error).split()).splitlines()])
    return f"{problem} (line {line} of {Path(frame.f_code.co_filename).name})"
