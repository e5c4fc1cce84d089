"""What all chapters use: the text, the check of a chapter, and the check of a trained figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxgpt.data.hub import DatasetUnavailableError
from mlxgpt.data.sources import open_source
from mlxgpt.learn.checks import run_checks

SHAKESPEARE_LENGTH = 1_115_394  # characters

_is_shakespeare: bool | None = None  # not loaded yet


def load_text() -> str:
    """Tiny Shakespeare: downloaded once, or in the folder MLXGPT_TEXTS; without a network, as much
    of mlxgpt's synthetic stories.
    """
    global _is_shakespeare
    if folder := os.environ.get("MLXGPT_TEXTS"):
        text = (Path(folder) / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    else:
        try:
            source = open_source(["shakespeare"])
        except DatasetUnavailableError as error:
            print(f"{error.problem}; using synthetic stories instead")
            stories = open_source(["synthetic"], megabytes=1.2).train
            # In the form of the plays, whose characters the chapters use.
            text = "".join(f"ROMEO:\n{piece.text}\n\n" for piece in stories)
        else:
            text = "".join(
                piece.text for split in (source.train, source.val or ()) for piece in split
            )
    _is_shakespeare = len(text) == SHAKESPEARE_LENGTH
    return text[:SHAKESPEARE_LENGTH]


class CharTokenizer:
    """Tokens are the characters of a text."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self.vocab_size = len(self.characters)
        self._ids = {character: n for n, character in enumerate(self.characters)}

    def encode(self, text: str) -> mx.array:
        """Text -> ids [N]."""
        return mx.array([self._ids[character] for character in text])

    def decode(self, ids: mx.array | Sequence[int]) -> str:
        """Ids [N] -> text."""
        return "".join(self.characters[int(n)] for n in ids)


def expect(value: float | mx.array, expected: float, tolerance: float) -> None:
    """Print a figure, and with Tiny Shakespeare require that it is as in the text of the chapter.

    Raises:
        AssertionError: if it differs by more than the tolerance, or no text was loaded.
    """
    assert _is_shakespeare is not None, "call load_text first"
    value = float(value)
    print(f"{value:.3f} (expected: {expected} ± {tolerance})")
    if _is_shakespeare:
        assert abs(value - expected) <= tolerance, f"{value} is not {expected} ± {tolerance}"


def check(chapter: int, functions: Mapping[str, Any]) -> None:
    """Check the functions of a chapter, as `mlxgpt learn check` does.

    Raises:
        AssertionError: if a check fails.
    """
    for result in run_checks(chapter, functions):
        assert result.problem is None, f"{result.claim}: {result.problem}"
        print(f"ok  {result.claim}")
