"""Flags of the command line that are made from the fields of config.py."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from typing import Any

from mlxgpt import config
from mlxgpt.settings import settings

SECTION_TITLES = {
    "model": "model (GPT-2's shape)",
    "data": "data",
    "optim": "optimizer and schedule",
    "train": "training",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a config, section by section."""
    for section, cls in config.SECTIONS.items():
        add_flags(parser.add_argument_group(SECTION_TITLES[section]), cls)


def add_flags(group: argparse._ArgumentGroup, cls: type) -> None:
    """One flag for each field; those that are not given leave no trace."""
    for name, kind, item in settings(cls):
        flag, default = "--" + name.replace("_", "-"), item.default
        # Those of a config's settings come from the tier's file.
        known = cls is config.Sampling and default not in (None, (), MISSING)
        shown = f" (default: {_shown(default)})" if known else ""
        help = (item.metadata["help"] + shown).replace("%", "%%")
        common = {"default": argparse.SUPPRESS, "help": help}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif kind == tuple[str, ...] and name == "stop":
            group.add_argument(flag, action="append", metavar="TEXT", **common)
        elif kind == tuple[str, ...]:
            group.add_argument(flag, nargs="+", metavar="PATH", **common)
        elif kind is str:
            group.add_argument(flag, metavar="|".join(item.metadata["choices"]), **common)
        else:
            number, letter = (float, "X") if kind is float else (int, "N")
            group.add_argument(flag, type=number, metavar=letter, **common)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else f"{default}"
