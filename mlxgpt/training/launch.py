"""From a request to a running training: find or prepare the data, name the run, check, resume.

Prints nothing; a callback is told what happens.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

from mlxgpt import files
from mlxgpt.backend.cpu import blas
from mlxgpt.backend.cpu import jit as compiler
from mlxgpt.backend.environment import surroundings
from mlxgpt.config import Config, differences, from_tree, override
from mlxgpt.corpus import prepare as preparation
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.corpus.hub import Unavailable
from mlxgpt.corpus.tokenizer import Tokenizer
from mlxgpt.corpus.tokens import blocks_per_epoch
from mlxgpt.distributed.group import LOCAL, ProcessGroup, in_turns
from mlxgpt.errors import UserError
from mlxgpt.machine import device, device_errors
from mlxgpt.model.gpt import load_parameters
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.training import selfcheck, session, together
from mlxgpt.training.beginning import Beginning
from mlxgpt.training.callback import Callback, Summary
from mlxgpt.training.existing import (
    as_planned,
    existing,
    is_finished,
    must_match,
    step_seconds,
    tell_of_changes,
)
from mlxgpt.training.following import follow
from mlxgpt.training.forecast import (
    Forecast,
    measure,
    must_fit,
    refuse_by_estimate,
    refuse_too_large,
)
from mlxgpt.training.guard import Guard
from mlxgpt.training.schedule import learning_rate_schedule
from mlxgpt.training.sizing import sized
from mlxgpt.training.step import new_step

WARMUP_SHARE = 10  # of a plan that is cut to size, at most one step in so many
FEWEST_STEPS = 2  # of a plan


def launch(
    config: Config,
    *,
    config_name: str,
    run_name: str | None,
    runs_dir: Path,
    data_dir: Path,
    max_minutes: float | None = None,
    fit_size: bool = False,
    memory_limit: float | None = None,
    fallback: str | None = None,
    strict_vocab: bool = False,
    beginning: Beginning | None = None,
    callback: Callback | None = None,
    group: ProcessGroup = LOCAL,
) -> Summary:
    """Train, from the beginning or from where the run stopped.

    Args:
        config: what to train; the vocabulary size and dtype are filled in here.
        config_name: for the run's name, which is CONFIG-DATA unless `run_name` is given.
        run_name: a name in `runs_dir`, or a folder's path.
        max_minutes: plan as many steps as fit into this time; timed at the start of a new run.
        fit_size: and choose the model's shape and the batch for it.
        memory_limit: gigabytes; a training that takes more is refused, or stopped and saved.
        fallback: a corpus to go on with where the config's cannot be had.
        strict_vocab: refuse data of another vocabulary than `vocab_size`; otherwise the model has
            room for what the config says, or for the data's where that is more.
        beginning: weights to begin with, of the config's shape; default: the seed's.
        callback: is told how it goes.
        group: the ranks that train together; each of them calls this.

    Raises:
        UserError: for everything that a user can mend.
    """
    callback = callback or Callback()
    if memory_limit is not None and not 0 < memory_limit < math.inf:
        raise UserError(f"--memory-limit {memory_limit} is no size", "give gigabytes above 0.")
    if max_minutes is not None and not 0 < max_minutes < math.inf:
        raise UserError(
            f"--max-minutes {max_minutes} is no length of time", "give a number above 0."
        )
    if not blas.is_fast() and device.on_cpu():
        callback.on_note(blas.status())
    if slower := compiler.status():
        callback.on_note(slower)
    tokenizer = beginning.tokenizer if beginning else None
    config, dataset, warning = in_turns(
        group, lambda: _data(config, data_dir, fallback, strict_vocab, tokenizer, callback)
    )
    if tokenizer and dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{dataset.folder} was prepared with another tokenizer than the weights know",
            "give the text itself: --source FILE.",
        )
    config = fit_to_data(device.resolve_dtype(config), dataset, strict_vocab=strict_vocab)
    if group.size > 1:
        together.agree(group, config, dataset, beginning)
    must_fit(config)
    limit = int(1e9 * memory_limit) if memory_limit else None
    refuse_by_estimate(config, group.size, limit)
    device.limit_memory(limit)
    name = run_name or f"{config_name}-{dataset.name}"
    folder = Path(name) if os.sep in name else runs_dir / name
    try:
        if not group.is_main:
            return _follow(group, dataset, folder, limit, callback)
        with files.only_one(folder, "training"):
            summary = _train(
                config, dataset, folder, beginning, max_minutes, fit_size, limit, callback, group
            )
    except KeyboardInterrupt:
        if not files.exists(folder / "run.json"):
            callback.on_note(f"{dataset.folder} is kept; the same command goes on from there")
        raise
    summary = replace(summary, warning=warning)
    callback.on_train_end(summary)
    return summary


def _data(
    config: Config,
    data_dir: Path,
    fallback: str | None,
    strict_vocab: bool,
    tokenizer: Tokenizer | None,
    callback: Callback,
) -> tuple[Config, Dataset, str | None]:
    """The config with its data; or, with a warning, with the fallback's."""

    def prepared(config: Config) -> Dataset:
        return preparation.find_or_prepare(
            config.data,
            data_dir,
            vocab_size=config.model.vocab_size,
            strict=strict_vocab,
            tokenizer=tokenizer,
            note=callback.on_note,
            progress=callback.on_prepare,
        )

    try:
        return config, prepared(config), None
    except Unavailable as error:
        if not fallback:
            raise
        warning = f"{error.problem}: this is the built-in {fallback} instead"
        callback.on_warning(warning)
        config = override(config, {"source": fallback})
        return config, prepared(config), warning


@device_errors.as_user_errors("; stopped")
def _train(
    config: Config,
    dataset: Dataset,
    folder: Path,
    beginning: Beginning | None,
    max_minutes: float | None,
    fit_size: bool,
    limit: int | None,
    callback: Callback,
    group: ProcessGroup,
) -> Summary:
    run = existing(folder)
    if run:
        if max_minutes:
            config = as_planned(config, run, fit_size)
        must_match(run, config, dataset, beginning)
        if is_finished(run, config):
            finished = {"finished": run.steps()[-1], "of": config.train.max_steps}
            group.broadcast("plan", finished)
            callback.on_note(f"{run.name} is finished: {run.steps()[-1]:,} steps")
            return Summary.of(run, config, dataset, step=run.steps()[-1])
    if max_minutes and fit_size and not run:
        config = sized(config, dataset, 60 * max_minutes, callback.on_note)
    group.broadcast("plan", {"config": asdict(config)})
    known = step_seconds(run) if run and group.size == 1 else None

    def measured(config: Config) -> tuple[Config, Forecast]:
        return config, first_steps(config, dataset, callback, known, group)

    config, forecast = session.with_retries(measured, config, folder, callback.on_note, group)
    refuse_too_large(config, forecast.peak_bytes, limit or device.free_bytes())
    if max_minutes and not run:
        steps = forecast.steps_in(60 * max_minutes, config)
        if steps < FEWEST_STEPS:
            raise UserError(
                f"in {max_minutes:g} minutes there is no time for {FEWEST_STEPS} steps of "
                f"{forecast.step_seconds:.2g} s",
                "give more minutes, or take smaller steps: --batch-size, "
                "--gradient-accumulation-steps.",
            )
        config = planned(config, steps)
    _tell_of_long_warmup(config, callback)
    return take_steps(
        folder,
        run,
        config,
        dataset,
        callback,
        forecast,
        beginning=beginning,
        limit=limit,
        group=group,
    )


@device_errors.as_user_errors("; stopped")
def _follow(
    group: ProcessGroup, dataset: Dataset, folder: Path, limit: int | None, callback: Callback
) -> Summary:
    """`_train` of the other ranks than the main one."""
    told = group.broadcast("plan")
    if "finished" in told:
        return Summary.of_follower(folder, dataset.folder, told["finished"], told["of"])
    config = from_tree(told["config"])
    forecast = first_steps(config, dataset, callback, None, group)
    refuse_too_large(config, forecast.peak_bytes, limit or device.free_bytes())
    step, steps = follow(group, config, dataset, forecast, limit)
    return Summary.of_follower(folder, dataset.folder, step, steps)


def take_steps(
    folder: Path,
    run: Run | None,
    config: Config,
    dataset: Dataset,
    callback: Callback,
    forecast: Forecast,
    *,
    beginning: Beginning | None = None,
    limit: int | None = None,
    group: ProcessGroup = LOCAL,
) -> Summary:
    """Train to the end, or until stopped: from a run's newest checkpoint, or where there is none
    from the beginning, as a new run in `folder`. After a failure of the GPU it continues from the
    newest checkpoint: see `session.with_retries`.

    Args:
        run: the one to resume, of the same config and data; None: a new one.
        config, dataset: fit each other, and the machine.
    """
    began, resumed, attempts = time.monotonic(), run is not None, 0

    def attempt(config: Config) -> Summary:
        nonlocal attempts
        attempts += 1
        opened = run if attempts == 1 else existing(folder)
        is_new = opened is None
        step_function = new_step(config, group=group)
        if opened:
            start, last_metrics, guard = session.resume(opened, step_function, config, callback)
            changed = differences(opened.config, config)
            tell_of_changes(opened, changed, callback, group.size)
            opened = replace(opened, config=config)
        else:
            start, last_metrics, guard, changed = 0, {}, Guard(config.train.on_spike), {}
            opened = _new_run(folder, config, dataset, beginning)
        if attempts == 1:
            callback.on_run(opened)
        if not is_new:
            opened.write_config(config)
        else:
            runs.create(opened)
            if beginning:
                load_parameters(step_function.model, beginning.parameters)
        planned = forecast.for_plan(config, start)
        on = surroundings(group.size)
        with runs.held(opened) as held:
            held.add_to_history(start, on, changed, planned.to_tree())
            # Killed after saving and before evaluating: what is missing is made up for.
            make_up = None if held.cut(start) else last_metrics
            callback.on_train_begin(held, dataset, start, planned)
            memory = guard.to_tree()
            together.begin(group, step_function, held, start, memory, missing=bool(make_up))
            with group.watch(planned.step_seconds):
                step = session.proceed(
                    held,
                    dataset,
                    step_function,
                    guard,
                    callback,
                    start=start,
                    limit=limit,
                    make_up=make_up,
                    group=group,
                )
        seconds = time.monotonic() - began
        return Summary.of(held, config, dataset, step=step, seconds=seconds, resumed=resumed)

    return session.with_retries(attempt, config, folder, callback.on_note, group)


def _new_run(folder: Path, config: Config, dataset: Dataset, beginning: Beginning | None) -> Run:
    return Run(
        folder,
        config,
        dataset.tokenizer,
        dataset.name,
        dataset.meta.fingerprint,
        add_bos_token=dataset.tokenizer.end_of_text is not None,
        origin=beginning.origin if beginning else {},
    )


def fit_to_data(config: Config, dataset: Dataset, *, strict_vocab: bool = False) -> Config:
    """The config with a vocabulary that the data fits into.

    Raises:
        UserError: if the text is too short for one step.
    """
    size = dataset.meta.vocab_size
    if config.model.vocab_size < size and not strict_vocab:
        config = override(config, {"vocab_size": size})
    if config.model.vocab_size < size:
        raise UserError(
            f"vocab_size = {config.model.vocab_size} is too small for {dataset.name}",
            f"use --vocab-size {size}, or leave it out.",
        )
    tokens, block = len(dataset.train.ids), config.model.block_size
    blocks_per_epoch(tokens, block)  # refuses a short text
    t = config.train
    if config.tokens_per_step > tokens:
        most = tokens // block // t.gradient_accumulation_steps
        raise UserError(
            f"the training text has {tokens:,} tokens, fewer than one step takes "
            f"({t.gradient_accumulation_steps} × {t.batch_size} × {block})",
            f"use a longer text, or --batch-size {most} or less."
            if most
            else "use a longer text, or fewer --gradient-accumulation-steps.",
        )
    return config


def first_steps(
    config: Config,
    dataset: Dataset,
    callback: Callback,
    step_seconds: float | None = None,
    group: ProcessGroup = LOCAL,
) -> Forecast:
    """The self-check, and a few steps, timed where it is not known how long one takes. They compile
    what the training runs, so that a compiler that fails, fails here; then it is all begun again
    without.
    """
    try:
        _check(config, callback)
        found = measure(config, dataset, step_seconds, group)
    except RuntimeError as error:
        if not (line := compiler.disable_after_failure(error)):
            raise
        callback.on_note(line)
        _check(config, callback)
        found = measure(config, dataset, None, group)
    if group.size == 1:
        return found
    found, line = together.forecast_together(group, config, found)
    callback.on_note(line)
    return found


def _check(config: Config, callback: Callback) -> None:
    for check in selfcheck.check(config):
        callback.on_check(check)
        if check.ok is False:
            raise UserError(
                f"the self-check failed: {check.name}: {check.detail}",
                "do not train on this; run mlxgpt check, and report what it says.",
            )


def planned(config: Config, steps: int) -> Config:
    """`config` for so many steps, no more than a tenth of them warmup."""
    # A warmup that was meant for a longer plan would be all there is of a short one.
    warmup = min(config.optim.warmup_steps, math.ceil(steps / WARMUP_SHARE))
    return override(config, {"max_steps": steps, "warmup_steps": warmup})


def _tell_of_long_warmup(config: Config, callback: Callback) -> None:
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if warmup < steps:
        return
    highest = float(learning_rate_schedule(config)(steps - 1))
    callback.on_note(
        f"the whole training is warmup: {warmup:,} steps of it, and {steps:,} in all; the learning "
        f"rate rises to {highest:.2g} and no further. Shorter: --warmup-steps "
        f"{steps // WARMUP_SHARE}"
    )
