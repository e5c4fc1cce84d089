"""Flags shared by several commands: settings, tier and recipe, run, folders."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from functools import cache
from typing import Any

from mlxgpt import config
from mlxgpt.config import toml
from mlxgpt.config.fields import iter_fields
from mlxgpt.utils.errors import UserError

SECTION_TITLES = {
    "model": "model (GPT-2's shape)",
    "data": "data",
    "optim": "optimizer and schedule",
    "train": "training",
    "lora": "LoRA",
}
# Shown by `--help`; `--help-all` shows every setting.
COMMON_SETTINGS = (
    *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout"),
    *("source", "tokenizer", "learning_rate", "batch_size", "max_steps", "seed", "eval_interval"),
    "lora_rank",
)
# Metavars that name a unit; other numbers are N (integer) or X (float).
UNITS = {
    "lora_layers": "all|N",
    "block_size": "TOKENS",
    "vocab_size": "TOKENS",
    "eval_tokens": "TOKENS",
    "sample_tokens": "TOKENS",
    "max_tokens": "TOKENS",
    "batch_size": "SEQUENCES",
    "max_steps": "STEPS",
    "warmup_steps": "STEPS",
    "decay_steps": "STEPS",
    "log_interval": "STEPS",
    "eval_interval": "STEPS",
    "save_interval": "STEPS",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds each tier's default to the help of a setting."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        setting = getattr(action, "setting", None)
        if setting and action.help and "default" not in action.help:
            return f"{action.help}{_format_tier_defaults(setting)}".replace("%", "%%")
        return action.help


class HelpAllAction(argparse.Action):
    """`--help-all`: prints the help with all settings."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        show_all_settings(parser)
        parser.print_help()
        parser.exit()


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting of a config, by section, and `--help-all`."""
    parser.add_argument(
        "--help-all",
        action=HelpAllAction,
        default=argparse.SUPPRESS,
        help="show this help with all settings, and exit",
    )
    parser.epilog = f"all settings: {parser.prog} --help-all"
    for section, cls in config.SECTIONS.items():
        add_dataclass_flags(parser.add_argument_group(SECTION_TITLES[section]), cls)


def add_dataclass_flags(group: argparse._ArgumentGroup, cls: type) -> None:
    """Add a flag for every field; flags that are not given are absent from the namespace."""
    for name, field_type, item in iter_fields(cls):
        flag, help_text = "--" + name.replace("_", "-"), item.metadata["help"]
        is_sampling = cls is config.SamplingParams
        if is_sampling and "default" not in help_text and item.default is not MISSING:
            help_text += f" (default: {_format_default(item.default)})"
        options = {"default": argparse.SUPPRESS, "help": help_text}
        if is_sampling:
            options["help"] = help_text.replace("%", "%%")
        if field_type is bool:
            action = group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field_type == tuple[str, ...] and name == "stop":
            action = group.add_argument(flag, action="append", metavar="TEXT", **options)
        elif field_type == tuple[str, ...]:
            action = group.add_argument(flag, nargs="+", metavar="PATH", **options)
        elif field_type is str:
            metavar = "|".join(item.metadata["choices"])
            action = group.add_argument(flag, metavar=metavar, **options)
        else:
            number_type: Callable[[str], float] = float if field_type is float else int
            metavar = UNITS.get(name, "X" if field_type is float else "N")
            if name == "lora_layers":
                number_type = _parse_layers
            action = group.add_argument(flag, type=number_type, metavar=metavar, **options)
        if not is_sampling:
            # Read by HelpFormatter; `hidden_help` is shown by --help-all.
            action.setting = name  # type: ignore[attr-defined]
            if name not in COMMON_SETTINGS:
                action.hidden_help = action.help  # type: ignore[attr-defined]
                action.help = argparse.SUPPRESS


def show_all_settings(parser: argparse.ArgumentParser) -> None:
    """Make `parser` show the settings that `--help` hides."""
    parser.epilog = None
    for action in parser._actions:
        action.help = getattr(action, "hidden_help", action.help)


def add_tier_flags(parser: argparse.ArgumentParser, default: str = "none") -> None:
    """Add `--tier`, `--recipe` and `--config`.

    Args:
        default: shown in the help: what is used without `--tier` and `--config`.
    """
    tiers = sorted(
        int(name[4:])
        for name in toml.find_builtin_configs()
        if name[:4] == "tier" and name[4:].isdecimal()
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--tier",
        type=int,
        choices=tiers,
        help=f"1: characters, Shakespeare; 2: byte-level BPE, short stories (default: {default})",
    )
    parser.add_argument(
        "--recipe",
        metavar="|".join(toml.RECIPES),
        help="of the tier: classic, as GPT-2 was trained; modern, with a lower loss; racing, with "
        "the lowest on stories, but only mlxgpt can run the model (default: classic)",
    )
    base.add_argument(
        "--config",
        metavar="FILE",
        help="instead of --tier: a TOML file, or a built-in config: gpt2-124m, gpt1-117m, "
        "tier2-pt (default: none)",
    )


def add_run_flags(
    parser: argparse.ArgumentParser, *, positional: bool = True, checkpoint: bool = True
) -> None:
    """Add the run, as a positional argument or `--run`, and `--checkpoint`."""
    help_text = "a run's name or folder (default: the newest trained run)"
    group = parser.add_mutually_exclusive_group()
    if positional:
        group.add_argument("run", nargs="?", metavar="RUN", help=help_text)
        help_text = "the same as RUN"
    group.add_argument("--run", metavar="RUN", help=help_text)
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            metavar="WHICH",
            help="best, newest, or a step number (default: best)",
        )


def add_quantize_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--quantize`, of `load`."""
    parser.add_argument(
        "--quantize",
        type=int,
        metavar="BITS",
        help="16, 8 or 4 bits per weight: faster, and the loss in quality is reported "
        "(default: 32)",
    )


def add_folder_flags(
    parser: argparse.ArgumentParser, *, runs: bool = False, data: bool = False
) -> None:
    """Add `--runs-dir` and `--data-dir`."""
    if runs:
        parser.add_argument("--runs-dir", metavar="DIR", help="folder of the runs (default: runs)")
    if data:
        parser.add_argument(
            "--data-dir", metavar="DIR", help="folder of prepared data (default: data)"
        )


def _parse_layers(text: str) -> int:
    return 0 if text == "all" else int(text)


@cache
def _format_tier_defaults(setting: str) -> str:
    """` (default: …)` from the tiers' files; empty if they cannot be read."""
    section = config.SECTION_BY_FIELD[setting]
    try:
        values = [getattr(getattr(_load_tier(n), section), setting) for n in (1, 2)]
    except UserError:
        return ""
    first, second = map(_format_default, values)
    if first == second:
        return f" (default: {first})"
    return f" (default: tier 1: {first}, tier 2: {second})"


@cache
def _load_tier(number: int) -> config.Config:
    return toml.load_tier_config(number)


def _format_default(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(default) or "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else f"{default}"
