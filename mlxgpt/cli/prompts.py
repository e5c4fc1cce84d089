"""Reads the prompts of `mlxgpt generate --prompts FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxgpt.config.resolve import PathLike
from mlxgpt.data import readers
from mlxgpt.data.normalize import normalize_text
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError


def read_prompts(path: PathLike) -> list[str]:
    """Read the prompts in a file: its non-empty lines; or, in a .jsonl or .json file, strings or
    objects with a field `prompt`.

    Raises:
        UserError: if the file cannot be read, has no prompts, or has JSON of another form.
    """
    try:
        text = normalize_text(readers.read_small_text(Path(path)))
    except OSError as error:
        raise files.to_user_error(
            error, "read", Path(path), "pass a text file with one prompt per line."
        ) from error
    except ValueError as error:
        raise UserError(
            f"cannot read {path}: {error}", "pass a text file with one prompt per line."
        ) from error
    # str.splitlines would also split at U+2028, U+0085 and form feeds.
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [line for _, line in lines]
    if Path(path).suffix.lower() in (".jsonl", ".ndjson", ".json"):
        prompts = _parse_json_prompts(text, path) or [
            _parse_prompt_line(line, location) for location, line in lines
        ]
    if not prompts:
        raise UserError(f"{path} contains no prompts", "write one prompt per line.")
    return prompts


def _parse_json_prompts(text: str, path: PathLike) -> list[str]:
    """Parse a file that is one JSON value, such as an array; empty for other files."""
    try:
        parsed = json_files.parse_json(text)
    except ValueError:
        return []
    entries = parsed if isinstance(parsed, list) else [parsed]
    return [_extract_prompt(entry, f"{path}, entry {n}") for n, entry in enumerate(entries, 1)]


def _parse_prompt_line(line: str, location: str) -> str:
    try:
        return _extract_prompt(json_files.parse_json(line), location)
    except ValueError:
        return _extract_prompt(None, location)


def _extract_prompt(entry: Any, location: str) -> str:
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if isinstance(prompt, str):
        return prompt
    raise UserError(
        f"{location} has no prompt",
        'write one prompt per line: "Once upon a time" or {"prompt": "Once upon a time"}.',
    )
