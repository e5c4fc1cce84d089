"""Training budget of each variant: time, tokens or steps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxgpt.config import Config
from mlxgpt.utils.errors import UserError


@dataclass(frozen=True)
class Budget:
    """A training budget in `steps`, `tokens` or `seconds`."""

    amount: float
    unit: str

    def steps(self, config: Config, step_seconds: float) -> int:
        """Number of steps of a config that fit into the budget, at least 1."""
        step_sizes = {"steps": 1, "tokens": config.tokens_per_step, "seconds": step_seconds}
        return max(1, round(self.amount / step_sizes[self.unit]))


BUDGET_PATTERN = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)(tokens|steps|s|m|h)")
SI_PREFIXES = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600}


def parse_budget(text: str) -> Budget:
    """Parse a budget: 5m, 90s, 1h; 10Mtokens, 500ktokens; 2000steps.

    Raises:
        UserError: if it has none of these forms.
    """
    match = BUDGET_PATTERN.fullmatch(text.strip())
    if not match or (match[2] and match[3] in SECONDS_PER_UNIT) or float(match[1]) == 0:
        raise UserError(
            f"--budget {text} is not a valid budget",
            "use a time (5m, 90s, 1h), a number of tokens (10Mtokens) or of steps (2000steps).",
        )
    amount = float(match[1]) * SI_PREFIXES[match[2]]
    if match[3] in SECONDS_PER_UNIT:
        return Budget(amount * SECONDS_PER_UNIT[match[3]], "seconds")
    return Budget(amount, match[3])
