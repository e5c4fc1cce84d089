"""Of `compare`: from what was asked for to variants, and from a record to its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxgpt import files
from mlxgpt.config import Config, DataConfig
from mlxgpt.corpus import prepare as preparation
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.corpus.held_back import held_back
from mlxgpt.errors import UserError
from mlxgpt.reports import comparison
from mlxgpt.requests import PathLike, home, resolve
from mlxgpt.study import budget as budgets
from mlxgpt.study import compare as study
from mlxgpt.study import sequential
from mlxgpt.study.compare import Observer, Request
from mlxgpt.study.ledger import TRAININGS
from mlxgpt.study.record import Record
from mlxgpt.study.variants import Variant, vary

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
    observer: Observer | None = None,
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
        observer: is told how it goes; see study/compare.py.
        settings: any field of the config, for all variants; `source`: the text.
    """
    observer = observer or Observer()
    length = budgets.parse(budget)
    label, chosen = _chosen(variants, vary, tier, config, settings)
    if smallest is not None and not (until_decided and 0 < smallest < math.inf):
        raise UserError(
            f"--smallest {smallest} is no difference to stop at",
            "give bits per byte above 0, and --until-decided.",
        )
    count = seeds if seeds is not None else sequential.MOST if until_decided else SEEDS
    least = sequential.FIRST if until_decided else 1
    if count < least:
        raise UserError(f"--seeds {count} are too few", f"use --seeds {least} or more.")
    name = name or f"{label}-{budget.replace(' ', '')}"
    if name != Path(name).name or name in ("", ".", "..", TRAININGS) or not name.isprintable():
        raise UserError(f"--name {name} is no name of a folder", "choose another --name.")
    request = Request(name, budget, length, count, until_decided, smallest or 0.0, final)
    folder = home("runs", runs_dir) / "compare"
    data = home("data", data_dir)
    record = study.compare(_variants(chosen, data, observer), request, folder, observer)
    write(record, folder / name)
    return record


def _chosen(
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


def _variants(chosen: dict[str, Config], data_dir: Path, observer: Observer) -> list[Variant]:
    """The configs with their data, which is opened and verified once where it is the same."""
    opened: dict[tuple[DataConfig, int], tuple[Dataset, Dataset]] = {}
    for config in chosen.values():
        asked = config.data, config.model.vocab_size
        if asked not in opened:
            request = preparation.PrepareRequest(config.data, config.model.vocab_size)
            whole = preparation.find_or_prepare(request, data_dir, observer.on_prepare)
            opened[asked] = held_back(whole), whole
    return [
        Variant(name, config, *opened[config.data, config.model.vocab_size])
        for name, config in chosen.items()
    ]


def write(record: Record, folder: Path) -> tuple[Path, Path]:
    """Write a record as JSON and as Markdown; their paths. What was judged on the validation text
    has names of its own.
    """
    name = record.name + "-final" * (record.judged_on == "validation")
    paths = folder / f"{name}.json", folder / f"{name}.md"
    files.write_atomically(paths[0], json.dumps(files.finite(asdict(record)), indent=1) + "\n")
    files.write_atomically(paths[1], comparison.markdown(record))
    return paths
