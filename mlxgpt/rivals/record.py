"""What came of a contest, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

US = "mlxgpt"  # among the contenders


@dataclass(frozen=True)
class Contest:
    """All rounds of one task.

    Attributes:
        config: the name of the model's config.
        what: training, generate, learning or preparation.
        texts: how many, in generation.
        rounds: the figures of each, by contender.
        made_with: versions, threads, BLAS and compiler of each.
        failed: who could not do it, and why.
    """

    config: str
    what: str
    texts: int = 0
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    made_with: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
