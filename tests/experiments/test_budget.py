from __future__ import annotations

import math

import pytest

from mlxgpt.config import Config, override_config
from mlxgpt.experiments.budget import Budget, parse_budget
from mlxgpt.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("5m", 300, "seconds"),
        ("90s", 90, "seconds"),
        ("1.5h", 5400, "seconds"),
        ("10Mtokens", 10_000_000, "tokens"),
        ("500ktokens", 500_000, "tokens"),
        ("2.5 Mtokens", 2_500_000, "tokens"),
        ("300tokens", 300, "tokens"),
        ("2000steps", 2000, "steps"),
        ("2ksteps", 2000, "steps"),
    ],
)
def test_valid_budgets(text: str, amount: float, unit: str) -> None:
    assert parse_budget(text) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["", "5", "m", "5 minutes", "-5m", "0m", "5km", "1e9steps", "5M"])
def test_invalid_budgets_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a valid budget"):
        parse_budget(text)


def test_number_of_steps_in_a_budget(tiny_model: Config) -> None:
    config = override_config(tiny_model, {"batch_size": 4, "gradient_accumulation_steps": 2})
    assert config.tokens_per_step == 4 * 2 * 8
    assert parse_budget("640tokens").steps(config, math.nan) == 10
    assert parse_budget("10s").steps(config, 0.25) == 40
    assert parse_budget("7steps").steps(config, math.nan) == 7
    assert parse_budget("1tokens").steps(config, math.nan) == 1, "at least one"
