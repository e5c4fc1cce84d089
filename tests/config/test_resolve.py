from __future__ import annotations

import pytest

from mlxgpt.config import toml
from mlxgpt.config.resolve import resolve_config
from mlxgpt.utils.errors import UserError


@pytest.mark.parametrize("tier", [1, 2])
def test_recipe_selects_the_config_of_the_tier(tier: int) -> None:
    for recipe, name in ((None, f"tier{tier}"), ("classic", f"tier{tier}")):
        assert resolve_config(tier, None, recipe) == (
            name,
            toml.load_config(toml.find_builtin_configs()[name]),
        )
    name, modern = resolve_config(tier, None, "modern", n_layer=3)
    assert name == f"tier{tier}-modern"
    assert modern.model.n_layer == 3
    assert modern.optim.optimizer == "muon"
    classic = toml.load_tier_config(tier)
    assert (modern.data, modern.model.block_size) == (classic.data, classic.model.block_size)
    assert modern.train.max_steps == classic.train.max_steps


@pytest.mark.parametrize(
    ("given", "problem", "remedy"),
    [
        ({}, "no config given", "--tier 1"),
        ({"recipe": "modern"}, "needs a model size", "--max-minutes M"),
        ({"recipe": "x", "tier": 1}, "there is no recipe x", "classic or modern"),
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
