"""The command `compare`: from its arguments to variants, and from a record to files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxgpt.config import Config, DataConfig
from mlxgpt.config.resolve import PathLike, home, resolve
from mlxgpt.data import prepare as preparation
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.holdout import held_back
from mlxgpt.experiments import budget as budgets
from mlxgpt.experiments import report, runner, sequential
from mlxgpt.experiments.registry import TRAININGS
from mlxgpt.experiments.results import Record
from mlxgpt.experiments.runner import CompareCallback, CompareRequest
from mlxgpt.experiments.variants import Variant, vary
from mlxgpt.training.callbacks import CallbackList
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

SEEDS = 3


def compare(
    *variants: PathLike | Config,
    budget: str,
    vary: str | None = None,
    tier: int | None = None,
    config: PathLike | Config | None = None,
    seeds: int | None = None,
    until_decided: bool = False,
    smallest: float | None = None,
    final: bool = False,
    name: str | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    callbacks: Sequence[CompareCallback] = (),
    **settings: Any,
) -> Record:
    """Train variants side by side, paired by seed, and say which is better, with its error.

    They are judged by bits per byte on the end of the training text, which is held back from all
    of them. What was trained once, in runs/compare, is not trained again. The result is also
    written to runs/compare/NAME.

    Args:
        variants: TOML files, or names of ours; the first is what the others are compared with.
            Or instead:
        vary: a field and its values, `dropout=0,0.1,0.2`, of a `tier` or a `config`.
        budget: how long each trains: `5m`, `10Mtokens` or `2000steps`.
        seeds: of each variant; default: 3, and at most 20 with `until_decided`.
        until_decided: add seeds until the interval leaves 0, or reaches less than `smallest` bits
            per byte to either side.
        final: judge on the validation text instead, and note that it was looked at.
        name: of its folder; default: from the variants and the budget.
        callbacks: receive the events of the comparison, in order; see experiments/runner.py.
        settings: any field of the config, for all variants; `source`: the text.
    """
    length = budgets.parse(budget)
    label, configs = _configs(variants, vary, tier, config, settings)
    seeds = _seeds(seeds, until_decided, smallest)
    request = CompareRequest(
        name=_folder_name(name or f"{label}-{budget.replace(' ', '')}"),
        budget_text=budget,
        budget=length,
        seeds=seeds,
        until_decided=until_decided,
        smallest=smallest or 0.0,
        final=final,
    )
    folder = home("runs", runs_dir) / "compare"
    prepared = _with_data(configs, home("data", data_dir), callbacks)
    record = runner.compare(prepared, request, folder, callbacks)
    write(record, folder / request.name)
    return record


def _seeds(seeds: int | None, until_decided: bool, smallest: float | None) -> int:
    """How many seeds each variant gets, at most; raises UserError for what makes no sense."""
    if smallest is not None and not (until_decided and 0 < smallest < math.inf):
        raise UserError(
            f"--smallest {smallest} is not a valid difference to stop at",
            "give bits per byte above 0, and --until-decided.",
        )
    if seeds is None:
        return sequential.MOST if until_decided else SEEDS
    least = sequential.FIRST if until_decided else 1
    if seeds < least:
        raise UserError(f"--seeds {seeds} are too few", f"use --seeds {least} or more.")
    return seeds


def _folder_name(name: str) -> str:
    """`name`, if a folder in runs/compare may have it."""
    if name != Path(name).name or name in ("", ".", "..", TRAININGS) or not name.isprintable():
        raise UserError(f"--name {name} is not a valid folder name", "choose another --name.")
    return name


def _configs(
    variants: Sequence[PathLike | Config],
    field: str | None,
    tier: int | None,
    config: PathLike | Config | None,
    settings: dict[str, Any],
) -> tuple[str, dict[str, Config]]:
    """A name for the comparison, and the configs by theirs."""
    if field:
        if variants:
            raise UserError("files and --vary are given", "give one of them.")
        name, base = resolve(tier, config, **settings)
        configs = vary(base, field)
        return f"{name}-{field.replace(' ', '')}", configs
    if tier is not None or config is not None:
        raise UserError(
            "--tier and --config tell what to vary", "add --vary FIELD=VALUE,VALUE, or name files."
        )
    if len(variants) < 2:
        raise UserError(
            "there is nothing to compare",
            "name two configs or more, or give --tier 1 --vary dropout=0,0.1.",
        )
    configs = {}
    for number, variant in enumerate(variants, 1):
        name, chosen = resolve(None, variant, **settings)
        if name in configs:
            name = f"{name}-{number}"
        configs[name] = chosen
    return "-".join(configs), configs


def _with_data(
    configs: dict[str, Config], data_dir: Path, callbacks: Sequence[CompareCallback]
) -> list[Variant]:
    """The configs with their data. Data that several share is opened and verified once."""
    progress = CallbackList(callbacks).on_prepare
    datasets: dict[tuple[DataConfig, int], tuple[Dataset, Dataset]] = {}
    for config in configs.values():
        key = config.data, config.model.vocab_size
        if key not in datasets:
            request = preparation.PrepareRequest(config.data, config.model.vocab_size)
            whole = preparation.find_or_prepare(request, data_dir, progress)
            datasets[key] = held_back(whole), whole
    return [
        Variant(name, config, *datasets[config.data, config.model.vocab_size])
        for name, config in configs.items()
    ]


def write(record: Record, folder: Path) -> tuple[Path, Path]:
    """Write a record as JSON and as Markdown; their paths. What was judged on the validation text
    has names of its own.
    """
    name = record.name + "-final" * (record.judged_on == "validation")
    paths = folder / f"{name}.json", folder / f"{name}.md"
    files.write_atomically(paths[0], json.dumps(files.finite(asdict(record)), indent=1) + "\n")
    files.write_atomically(paths[1], report.markdown(record))
    return paths
