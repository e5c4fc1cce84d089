"""The function behind `mlxgpt compare`: resolves the variants, compares them, writes the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxgpt.config import Config, DataConfig
from mlxgpt.config.resolve import PathLike, resolve_config, resolve_folder
from mlxgpt.data import prepare
from mlxgpt.data.dataset import Dataset
from mlxgpt.data.holdout import hold_out_from_train
from mlxgpt.data.prepare_job import PrepareRequest
from mlxgpt.experiments import report, runner, sequential
from mlxgpt.experiments.budget import parse_budget
from mlxgpt.experiments.registry import RUNS_FOLDER
from mlxgpt.experiments.results import ComparisonRecord, record_to_json
from mlxgpt.experiments.runner import CompareCallback, CompareRequest
from mlxgpt.experiments.variants import Variant, parse_vary
from mlxgpt.training.callbacks import CallbackList
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError


def compare(
    *variants: PathLike | Config,
    budget: str,
    vary: str | None = None,
    tier: int | None = None,
    config: PathLike | Config | None = None,
    seeds: int | None = None,
    until_decided: bool = False,
    min_effect: float | None = None,
    on_validation: bool = False,
    name: str | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    callbacks: Sequence[CompareCallback] = (),
    **settings: Any,
) -> ComparisonRecord:
    """Train variants with the same seeds, and report which is better, with confidence intervals.

    Variants are judged by bits per byte on the end of the training data, which is held out from all
    of them. Runs that are already in runs/compare are reused. The result is also written to
    runs/compare/NAME.

    Args:
        variants: TOML files, or names of built-in configs; the first is the baseline. Instead of
            variants, pass:
        vary: a field and its values, such as `dropout=0,0.1,0.2`, for a `tier` or a `config`.
        budget: training length of each run: `5m`, `10Mtokens` or `2000steps`.
        seeds: number of seeds per variant; default: 3, or up to 20 with `until_decided`.
        until_decided: add seeds until the interval excludes 0, or its half-width is below
            `min_effect` bits per byte.
        on_validation: judge on the validation split instead, and record that it was used.
        name: name of the result's folder; default: from the variants and the budget.
        callbacks: receive the events of the comparison, in order; see experiments/runner.py.
        settings: any config fields, for all variants; `source` is the dataset.
    """
    parsed_budget = parse_budget(budget)
    label, configs = _resolve_configs(variants, vary, tier, config, settings)
    if any(variant.lora.lora_rank for variant in configs.values()):
        raise UserError("compare trains from scratch, without LoRA", "omit --lora-rank.")
    seeds = _resolve_seeds(seeds, until_decided, min_effect)
    request = CompareRequest(
        name=check_folder_name(name or f"{label}-{budget.replace(' ', '')}"),
        budget_text=budget,
        budget=parsed_budget,
        seeds=seeds,
        until_decided=until_decided,
        min_effect=min_effect or 0.0,
        final=on_validation,
    )
    folder = resolve_folder("runs", runs_dir) / "compare"
    prepared_variants = _prepare_variants(configs, resolve_folder("data", data_dir), callbacks)
    record = runner.run_comparison(prepared_variants, request, folder, callbacks)
    write_comparison_files(record, folder / request.name)
    return record


DEFAULT_SEEDS = 3  # per variant


def _resolve_seeds(seeds: int | None, until_decided: bool, min_effect: float | None) -> int:
    """Maximum number of seeds per variant; raises UserError for invalid values."""
    if min_effect is not None and not (until_decided and 0 < min_effect < math.inf):
        raise UserError(
            f"--min-effect {min_effect} is not a valid difference",
            "use bits per byte above 0, together with --until-decided.",
        )
    if seeds is None:
        return sequential.MAX_SEEDS if until_decided else DEFAULT_SEEDS
    min_seeds = sequential.MIN_SEEDS if until_decided else 1
    if seeds < min_seeds:
        raise UserError(f"--seeds {seeds} is too few", f"use --seeds {min_seeds} or more.")
    return seeds


def check_folder_name(name: str) -> str:
    """Return `name`; raises UserError if it is not valid for a folder in runs/compare."""
    if name != Path(name).name or name in ("", ".", "..", RUNS_FOLDER) or not name.isprintable():
        raise UserError(f"--name {name} is not a valid folder name", "choose another --name.")
    return name


def _resolve_configs(
    variants: Sequence[PathLike | Config],
    vary_spec: str | None,
    tier: int | None,
    config: PathLike | Config | None,
    settings: dict[str, Any],
) -> tuple[str, dict[str, Config]]:
    """Name of the comparison, and the configs by variant name."""
    if vary_spec:
        if variants:
            raise UserError("config files and --vary cannot be combined", "use one of them.")
        name, base = resolve_config(tier, config, **settings)
        configs = parse_vary(base, vary_spec)
        return f"{name}-{vary_spec.replace(' ', '')}", configs
    if tier is not None or config is not None:
        raise UserError(
            "--tier and --config require --vary",
            "add --vary FIELD=VALUE,VALUE, or pass config files instead.",
        )
    if len(variants) < 2:
        raise UserError(
            "there is nothing to compare",
            "pass two or more configs, or use --tier 1 --vary dropout=0,0.1.",
        )
    configs = {}
    for number, variant in enumerate(variants, 1):
        name, resolved_config = resolve_config(None, variant, **settings)
        if name in configs:
            name = f"{name}-{number}"
        configs[name] = resolved_config
    return "-".join(configs), configs


def _prepare_variants(
    configs: dict[str, Config], data_dir: Path, callbacks: Sequence[CompareCallback]
) -> list[Variant]:
    """The variants with their datasets; a dataset that several use is opened and verified once."""
    progress = CallbackList(callbacks).on_prepare
    datasets: dict[tuple[DataConfig, int], tuple[Dataset, Dataset]] = {}
    for config in configs.values():
        key = config.data, config.model.vocab_size
        if key not in datasets:
            request = PrepareRequest(config.data, config.model.vocab_size)
            dataset = prepare.find_or_prepare(request, data_dir, progress)
            datasets[key] = hold_out_from_train(dataset), dataset
    return [
        Variant(name, config, *datasets[config.data, config.model.vocab_size])
        for name, config in configs.items()
    ]


def write_comparison_files(record: ComparisonRecord, folder: Path) -> tuple[Path, Path]:
    """Write a record as JSON and Markdown, and return both paths. Results on the validation split
    have separate file names.
    """
    name = record.name + "-final" * (record.judged_on == "validation")
    json_path, markdown_path = folder / f"{name}.json", folder / f"{name}.md"
    files.write_atomically(json_path, record_to_json(record))
    files.write_atomically(markdown_path, report.render_comparison(record))
    return json_path, markdown_path
