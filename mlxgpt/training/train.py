"""`mlxgpt.train`: resolves its arguments to a request, sets up the job and runs it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from mlxgpt.config import Config
from mlxgpt.config.resolve import PathLike, resolve_config, resolve_folder
from mlxgpt.data.sources import SYNTHETIC
from mlxgpt.distributed.group import init_process_group
from mlxgpt.storage import run as run_folders
from mlxgpt.training import loop as train_loop
from mlxgpt.training.auto_size import resolve_auto_size
from mlxgpt.training.callbacks import Callback, CallbackList, TrainingSummary
from mlxgpt.training.finetune import ARCHITECTURE_FIELDS, choose_config, load_init_weights
from mlxgpt.training.job import TrainRequest
from mlxgpt.training.loggers import make_logger
from mlxgpt.training.retries import retry_on_gpu_failure
from mlxgpt.training.setup import setup_job
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


def train(
    tier: int | None = None,
    *,
    config: PathLike | Config | None = None,
    recipe: str | None = None,
    run: str | None = None,
    init_from: str | None = None,
    max_minutes: float | None = None,
    memory_limit: float | None = None,
    runs_dir: PathLike | None = None,
    data_dir: PathLike | None = None,
    report_to: str | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> TrainingSummary:
    """Train a model, or resume a run that was stopped.

    Args:
        tier: built-in model size and dataset, 1 or 2.
        config: TOML file, name of a built-in config, or `Config`, instead of a tier.
        recipe: recipe for the tier: `classic` (default), `modern` or `racing`.
        run: name or folder of the run; default: CONFIG-DATA.
        init_from: trained or imported run to initialize from. Its architecture and tokenizer are
            used, with the built-in config `finetune`, `lora` with a `lora_rank`, or `dpo` for
            preference pairs, unless a tier or config is given.
        max_minutes: plan as many steps as fit into this time. Without a tier, a config and
            `init_from`, this also chooses a model size for that time, this data and this machine,
            with the recipe `racing` (default) or `modern`.
        memory_limit: gigabytes; training that needs more is refused, or saved and stopped.
        runs_dir, data_dir: folders; default: `runs` and `data` in $MLXGPT_HOME or here.
        report_to: `tensorboard` or `wandb`, to log metrics there, too.
        callbacks: receive the events of training; see training/callbacks.py.
        settings: any field of the config, such as `n_layer=6, source="my.txt"`.

    If Tier 1's dataset cannot be downloaded, it trains on synthetic stories, and logs a warning.
    """
    fit_size = bool(max_minutes) and not (tier or config or init_from)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(init_process_group())
        all_callbacks = list(callbacks) if group.is_main else []
        if report_to and group.is_main:
            # First, so that it gets every record even if another callback raises.
            all_callbacks.insert(0, stack.enter_context(make_logger(report_to)))
        callback_list = CallbackList(all_callbacks)
        init_weights = None
        if fit_size:
            if group.size > 1:
                raise UserError(
                    "automatic model size is not supported in distributed training",
                    "set the size with --tier 2, or with --config, --n-layer and --n-embd.",
                )
            recipe = recipe or "racing"
            name = f"{recipe}-{max_minutes:g}min"
            resolved_config = resolve_auto_size(recipe, f"--max-minutes {max_minutes:g}", settings)
        elif init_from:
            parent = run_folders.find_run(init_from, resolve_folder("runs", runs_dir))
            other_settings = {
                k: v for k, v in settings.items() if k not in (*ARCHITECTURE_FIELDS, "block_size")
            }
            if tier is None and config is None:
                config = choose_config(other_settings)
            _, resolved_config = resolve_config(tier, config, recipe, **other_settings)
            resolved_config, init_weights = load_init_weights(parent, resolved_config, settings)
            name = parent.name
        else:
            name, resolved_config = resolve_config(tier, config, recipe, **settings)
        has_custom_source = "source" in settings or "val_source" in settings
        request = TrainRequest(
            resolved_config,
            config_name=name,
            run_name=run,
            runs_dir=resolve_folder("runs", runs_dir),
            data_dir=resolve_folder("data", data_dir),
            max_minutes=max_minutes,
            auto_size=fit_size,
            memory_limit=memory_limit,
            fallback_source=SYNTHETIC if tier == 1 and not has_custom_source else None,
            strict_vocab=bool(settings.get("vocab_size")),
            init_weights=init_weights,
        )
        with setup_job(request, group, callback_list) as job:
            run_to_end = partial(train_loop.run_training_loop, group=group, callbacks=callback_list)
            summary = retry_on_gpu_failure(run_to_end, job, group)
        callback_list.on_train_end(summary)
        return summary
