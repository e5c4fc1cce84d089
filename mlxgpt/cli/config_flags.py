"""Flags that several commands share: those of the config's fields, of recipes, runs and folders."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from typing import Any

from mlxgpt import config
from mlxgpt.config import toml
from mlxgpt.config.schema import settings

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


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """`--tier`, `--recipe` and `--config`."""
    tiers = sorted(int(n[4:]) for n in toml.built_in() if n[:4] == "tier" and n[4:].isdecimal())
    help = "1: characters, Shakespeare; 2: byte-level BPE, short stories"
    parser.add_argument("--tier", type=int, choices=tiers, help=help)
    parser.add_argument(
        "--recipe",
        metavar="|".join(toml.RECIPES),
        help="the tier as GPT-2 was trained (default), or with what was found since",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file instead, or one of ours: gpt2-124m, gpt1-117m, five-minutes",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """`--run` and `--checkpoint`."""
    parser.add_argument("--run", metavar="NAME", help="a run's name or folder (default: newest)")
    parser.add_argument(
        "--checkpoint", metavar="WHICH", help="best (default), newest, or a step number"
    )


def add_folders(parser: argparse.ArgumentParser, *, runs: bool = False, data: bool = False) -> None:
    """`--runs-dir` and `--data-dir`."""
    if runs:
        parser.add_argument("--runs-dir", metavar="DIR", help="where runs lie (default: runs)")
    if data:
        parser.add_argument("--data-dir", metavar="DIR", help="where data lies (default: data)")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else f"{default}"
