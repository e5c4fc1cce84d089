"""Resolve flags, tiers, recipes and TOML files to one config, and find the default folders.

The defaults are `runs` and `data` in $MLXGPT_HOME, or in the current folder if it is not set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlxgpt import config as configs
from mlxgpt.config import Config, toml
from mlxgpt.utils.errors import UserError

PathLike = str | Path


def resolve_folder(kind: str, folder: PathLike | None = None) -> Path:
    """The folder for runs or data; `kind` is `runs` or `data`."""
    return Path(folder) if folder else Path(os.environ.get("MLXGPT_HOME") or ".") / kind


def resolve_config(
    tier: int | None = None,
    config: PathLike | Config | None = None,
    recipe: str | None = None,
    **settings: Any,
) -> tuple[str, Config]:
    """Name and config of a tier with a recipe, a built-in config, a TOML file or a `Config`;
    keyword settings override single fields (`n_layer=6`).
    """
    if recipe not in (None, *toml.RECIPES):
        raise UserError(f"there is no recipe {recipe}", f"use one of {', '.join(toml.RECIPES)}.")
    if recipe and tier is None:
        auto_size = f"; for a size that fits M minutes: --recipe {recipe} --max-minutes M"
        raise UserError(
            f"--recipe {recipe} needs a model size",
            f"add --tier 1 or --tier 2{auto_size if recipe != 'classic' else '.'}",
        )
    if tier is not None and config is not None:
        raise UserError("--tier and --config cannot be used together", "use one of them.")
    if isinstance(config, Config):
        name, base = "custom", config
    elif config is not None:
        path = toml.find_builtin_configs().get(str(config), Path(config))
        name, base = path.stem, toml.load_config(path)
    elif tier is not None:
        recipe = recipe or "classic"
        name, base = toml.tier_config_name(tier, recipe), toml.load_tier_config(tier, recipe)
    else:
        raise UserError("no config given", "use --tier 1, or --config FILE.")
    return name, configs.override_config(base, settings)
