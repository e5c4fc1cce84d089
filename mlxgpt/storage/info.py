"""Size and cost of a config or a run, and the list of runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from mlxgpt import config as configs
from mlxgpt.config import Config
from mlxgpt.config.resolve import PathLike, resolve_config, resolve_folder
from mlxgpt.model.stats import (
    count_parameters,
    count_parameters_by_part,
    min_training_bytes,
    training_flops_per_token,
)
from mlxgpt.storage import run as run_folders
from mlxgpt.utils import files
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfigInfo:
    """Size and cost of a config or a run.

    Attributes:
        parameters: number of parameters by part; "all" is their sum.
        flops_per_token: training FLOPs per token, forward and backward.
        training_tokens: tokens in all planned steps.
        memory_bytes: minimum memory for weights, gradients and AdamW's two moments.
    """

    name: str
    config: Config
    parameters: dict[str, int]
    flops_per_token: int
    training_tokens: int
    memory_bytes: int
    step: int | None = None
    val_loss: float | None = None


def info(
    tier: int | None = None,
    *,
    run: str | None = None,
    config: PathLike | Config | None = None,
    runs_dir: PathLike | None = None,
    **settings: Any,
) -> ConfigInfo:
    """Size and cost of a tier, a config or a run: shape, parameters, FLOPs, memory."""
    step = val_loss = None
    has_settings = tier is not None or config is not None or bool(settings)
    if run is not None and has_settings:
        raise UserError(
            f"the run {run} cannot be combined with a tier, a config or settings",
            "omit the run, or omit them.",
        )
    if not has_settings:
        opened_run = run_folders.find_run(run, resolve_folder("runs", runs_dir))
        name, resolved_config = opened_run.name, opened_run.config
        step = opened_run.steps()[-1] if opened_run.steps() else None
        best = opened_run.best()
        val_loss = best["val_loss"] if best else None
    else:
        name, resolved_config = resolve_config(tier, config, **settings)
    resolved_config = configs.fill_vocab_size(resolved_config)
    m = resolved_config.model
    return ConfigInfo(
        name=name,
        config=resolved_config,
        parameters={**count_parameters_by_part(m), "all": count_parameters(m)},
        flops_per_token=training_flops_per_token(resolved_config),
        training_tokens=resolved_config.train.max_steps * resolved_config.tokens_per_step,
        memory_bytes=min_training_bytes(resolved_config),
        step=step,
        val_loss=val_loss,
    )


@dataclass(frozen=True)
class RunSummary:
    """A row in the list of runs; `steps` is the planned steps, 0 for an imported run."""

    name: str
    step: int
    steps: int
    val_loss: float | None
    parameters: int
    data: str


def runs(*, runs_dir: PathLike | None = None) -> list[RunSummary]:
    """List all runs, newest first. Damaged or unreadable runs are logged and skipped."""
    summaries = []
    for folder in run_folders.list_run_folders(
        resolve_folder("runs", runs_dir), skip_unreadable=True
    ):
        try:
            summaries.append(summarize_run(run_folders.open_run(folder)))
        except UserError as error:
            logger.warning(error.problem)
        except OSError as error:
            logger.warning(files.to_user_error(error, "read", folder).problem)
    return summaries


def summarize_run(run: run_folders.Run) -> RunSummary:
    """The row of a run in the list."""
    best = run.best()
    return RunSummary(
        name=run.name,
        step=max(run.steps(), default=0),
        steps=run.config.train.max_steps if run.data_name else 0,
        val_loss=best["val_loss"] if best else None,
        parameters=count_parameters(run.config.model),
        data=run.data_name or "–",
    )
