"""Reads the prompts of `mlxgpt generate --prompts FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxgpt.config.resolve import PathLike
from mlxgpt.data import readers
from mlxgpt.data.normalize import normalize_text
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


def prompts_in(path: PathLike) -> list[str]:
    """The prompts in a file: its lines, but for empty ones; or of JSON lines or a JSON array, by
    its name, strings or the field `prompt`.

    Raises:
        UserError: if it cannot be read, a line of JSON is neither, or there is none.
    """
    try:
        text = normalize_text(readers.read_small_text(Path(path)))
    except OSError as error:
        raise files.os_error(error, "read", Path(path), "give a text of prompts.") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}", "give a text of prompts.") from error
    # Not by str.splitlines, which also cuts at U+2028, U+0085, form feeds, ….
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [line for _, line in lines]
    if Path(path).suffix.lower() in (".jsonl", ".ndjson", ".json"):
        prompts = _json_prompts(text, path) or [_prompt_of(line, where) for where, line in lines]
    if not prompts:
        raise UserError(f"there is no prompt in {path}", "write one a line.")
    return prompts


def _json_prompts(text: str, path: PathLike) -> list[str]:
    """The prompts of a file that is one JSON value, such as an array; none of another file."""
    try:
        tree = files.parse_json(text)
    except ValueError:
        return []
    entries = tree if isinstance(tree, list) else [tree]
    return [_prompt_in(entry, f"{path}, entry {n}") for n, entry in enumerate(entries, 1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        return _prompt_in(files.parse_json(line), where)
    except ValueError:
        return _prompt_in(None, where)


def _prompt_in(tree: Any, where: str) -> str:
    prompt = tree.get("prompt") if isinstance(tree, dict) else tree
    if isinstance(prompt, str):
        return prompt
    raise UserError(
        f"{where}: no prompt",
        'write one a line, "Once upon a time" or {"prompt": "Once upon a time"}.',
    )
