"""Rows of files of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

USER, SECOND_USER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And?"}
ANSWER, SECOND = {"role": "assistant", "content": "Yo"}, {"role": "assistant", "content": "No"}
TALK = {"messages": [USER, ANSWER, SECOND_USER, SECOND]}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [SECOND]}


def write_rows(path: Path, *rows: Any) -> str:
    """Write rows as JSON Lines, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
