"""Read and write configs as TOML files, and find the built-in ones."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from mlxgpt.config import SECTIONS, Config, config_from_tree
from mlxgpt.config.fields import iter_fields
from mlxgpt.utils import files, json_files
from mlxgpt.utils.errors import UserError

RECIPES = ("classic", "modern", "racing")  # tier1.toml, tier1-modern.toml, tier1-racing.toml


REMOVED_FIELD = ("model", "zero_init")  # (section, name), in configs of old runs
RENAMED_VALUES = (  # (section, name, old, new)
    ("optim", "schedule", "linear", "wsd"),
    ("data", "source", ["storybook"], ["synthetic"]),
)


def load_config(path: str | Path, remedy: str = "") -> Config:
    """Read a config from a TOML file; missing fields keep their defaults.

    Args:
        remedy: for an unknown key or an invalid value; default: from the key.

    Raises:
        UserError: if it cannot be read, or has an unknown key or an invalid value.
    """
    try:
        with json_files.recursion_error_as_value_error():
            # Some editors write a byte order mark.
            tree = tomllib.loads(files.read_small(Path(path)).removeprefix("\ufeff"))
    except OSError as error:
        remedy = f"use a TOML file, or one of {', '.join(sorted(find_builtin_configs()))}."
        raise files.to_user_error(error, "read the config", Path(path), remedy) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not valid TOML: {error}", "fix that line; configs/tier1.toml is an example."
        ) from error
    section, name = REMOVED_FIELD
    if isinstance(tree.get(section), dict):
        tree[section].pop(name, None)
    for section, name, old_value, new_value in RENAMED_VALUES:
        if isinstance(tree.get(section), dict) and tree[section].get(name) == old_value:
            tree[section][name] = new_value
    try:
        return config_from_tree(tree)
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", remedy or error.remedy) from error


SURROGATE_PATTERN = re.compile("[\ud800-\udfff]")


def config_to_toml(config: Config) -> str:
    """Format a config as TOML, with help texts as comments; `load_config` reads it back."""
    lines = []
    for section, cls in SECTIONS.items():
        lines.append(f"[{section}]")
        for name, _, item in iter_fields(cls):
            value = getattr(getattr(config, section), name)
            # JSON and TOML write these types alike, except for one control character.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            # TOML cannot hold surrogates, which stand for non-UTF-8 bytes of file names.
            text = SURROGATE_PATTERN.sub(lambda c: f"\\\\u{ord(c[0]):04x}", text)
            lines.append(f"{name} = {text}  # {item.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def find_builtin_configs() -> dict[str, Path]:
    """Paths of the built-in configs, by name: inside the package if it was installed from a wheel,
    next to it in a checkout.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if paths := files.list_matching(folder, "*.toml"):
            return {path.stem: path for path in paths}
    return {}


def tier_config_name(number: int, recipe: str = "classic") -> str:
    """Name of the built-in config of Tier 1 or 2 with a recipe."""
    return f"tier{number}" if recipe == "classic" else f"tier{number}-{recipe}"


def load_tier_config(number: int, recipe: str = "classic") -> Config:
    """Load the built-in config of Tier 1 or 2 with a recipe."""
    name = tier_config_name(number, recipe)
    return load_config(find_builtin_configs().get(name, Path(f"configs/{name}.toml")))
