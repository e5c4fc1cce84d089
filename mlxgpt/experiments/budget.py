"""How long each variant may train: in time, tokens or steps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxgpt.config import Config
from mlxgpt.utils.errors import UserError

FORM = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)(tokens|steps|s|m|h)")
SCALES = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """So many `steps`, `tokens`, or `seconds` of training."""

    amount: float
    unit: str

    def steps(self, config: Config, step_seconds: float) -> int:
        """How many steps of a config fit into it, at least one."""
        each = {"steps": 1, "tokens": config.tokens_per_step, "seconds": step_seconds}[self.unit]
        return max(1, round(self.amount / each))


def parse(text: str) -> Budget:
    """A budget as it is written: 5m, 90s, 1h; 10Mtokens, 500ktokens; 2000steps.

    Raises:
        UserError: if it is none of these.
    """
    found = FORM.fullmatch(text.strip())
    if not found or (found[2] and found[3] in SECONDS) or float(found[1]) == 0:
        raise UserError(
            f"--budget {text} is no length of a training",
            "write it as 5m, 90s or 1h, as 10Mtokens, or as 2000steps.",
        )
    amount = float(found[1]) * SCALES[found[2]]
    if found[3] in SECONDS:
        return Budget(amount * SECONDS[found[3]], "seconds")
    return Budget(amount, found[3])
