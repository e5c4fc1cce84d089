"""Flags that several commands share: those of the config's fields, of recipes, runs and folders."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from typing import Any

from mlxgpt import config
from mlxgpt.config import toml
from mlxgpt.config.fields import iter_fields

SECTION_TITLES = {
    "model": "model (GPT-2's shape)",
    "data": "data",
    "optim": "optimizer and schedule",
    "train": "training",
}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a config, section by section."""
    for section, cls in config.SECTIONS.items():
        add_dataclass_flags(parser.add_argument_group(SECTION_TITLES[section]), cls)


def add_dataclass_flags(group: argparse._ArgumentGroup, cls: type) -> None:
    """One flag for each field; those that are not given leave no trace."""
    for name, field_type, item in iter_fields(cls):
        flag, default = "--" + name.replace("_", "-"), item.default
        # Those of a config's settings come from the tier's file.
        show_default = cls is config.SamplingParams and default not in (None, (), MISSING)
        default_text = f" (default: {_format_default(default)})" if show_default else ""
        help_text = (item.metadata["help"] + default_text).replace("%", "%%")
        options = {"default": argparse.SUPPRESS, "help": help_text}
        if field_type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field_type == tuple[str, ...] and name == "stop":
            group.add_argument(flag, action="append", metavar="TEXT", **options)
        elif field_type == tuple[str, ...]:
            group.add_argument(flag, nargs="+", metavar="PATH", **options)
        elif field_type is str:
            group.add_argument(flag, metavar="|".join(item.metadata["choices"]), **options)
        else:
            number_type, placeholder = (float, "X") if field_type is float else (int, "N")
            group.add_argument(flag, type=number_type, metavar=placeholder, **options)


def add_tier_flags(parser: argparse.ArgumentParser) -> None:
    """`--tier`, `--recipe` and `--config`."""
    tiers = sorted(
        int(name[4:])
        for name in toml.find_builtin_configs()
        if name[:4] == "tier" and name[4:].isdecimal()
    )
    tier_help = "1: characters, Shakespeare; 2: byte-level BPE, short stories"
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--tier", type=int, choices=tiers, help=tier_help)
    parser.add_argument(
        "--recipe",
        metavar="|".join(toml.RECIPES),
        help="the tier as GPT-2 was trained (default), or with what was found since",
    )
    base.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file instead, or one of ours: gpt2-124m, gpt1-117m, five-minutes",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """`--run` and `--checkpoint`."""
    parser.add_argument("--run", metavar="NAME", help="a run's name or folder (default: newest)")
    parser.add_argument(
        "--checkpoint", metavar="WHICH", help="best (default), newest, or a step number"
    )


def add_folder_flags(
    parser: argparse.ArgumentParser, *, runs: bool = False, data: bool = False
) -> None:
    """`--runs-dir` and `--data-dir`."""
    if runs:
        parser.add_argument("--runs-dir", metavar="DIR", help="where runs lie (default: runs)")
    if data:
        parser.add_argument("--data-dir", metavar="DIR", help="where data lies (default: data)")


def _format_default(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default)
    return str(default).lower() if isinstance(default, bool) else f"{default}"
