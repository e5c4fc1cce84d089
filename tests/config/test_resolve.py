from __future__ import annotations

import pytest

from mlxgpt.config import override_config, toml
from mlxgpt.config.resolve import resolve_config
from mlxgpt.utils.errors import UserError


@pytest.mark.parametrize("tier", [1, 2])
def test_recipe_selects_the_config_of_the_tier(tier: int) -> None:
    for recipe, name in ((None, f"tier{tier}"), ("classic", f"tier{tier}")):
        assert resolve_config(tier, None, recipe) == (
            name,
            toml.load_config(toml.find_builtin_configs()[name]),
        )
    classic = toml.load_tier_config(tier)
    for recipe in ("modern", "racing"):
        name, changed = resolve_config(tier, None, recipe, n_layer=3)
        assert name == f"tier{tier}-{recipe}"
        assert changed.model.n_layer == 3
        assert changed.optim.optimizer == "muon"
        assert (changed.data, changed.tokens_per_step) == (classic.data, classic.tokens_per_step)
        batch_size = classic.train.batch_size
        assert override_config(changed, {"batch_size": batch_size}).train == classic.train


@pytest.mark.parametrize(
    ("given", "problem", "remedy"),
    [
        ({}, "no config given", "--tier 1"),
        ({"recipe": "modern"}, "needs a model size", "--recipe modern --max-minutes M"),
        ({"recipe": "racing"}, "needs a model size", "--recipe racing --max-minutes M"),
        ({"recipe": "classic"}, "needs a model size", "--tier 1 or --tier 2."),
        ({"recipe": "x", "tier": 1}, "there is no recipe x", "classic, modern, racing"),
        (
            {"tier": 1, "config": "tier2"},
            "--tier and --config cannot be used together",
            "one of them",
        ),
        ({"recipe": "modern", "config": "tier2"}, "needs a model size", "--tier 1"),
    ],
)
def test_missing_or_conflicting_config_arguments_are_refused(
    given: dict, problem: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=problem) as excinfo:
        resolve_config(**given)
    assert remedy in excinfo.value.remedy
