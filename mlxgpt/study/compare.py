"""Trains variants side by side, seed by seed, until what was asked for is there or decided.

Prints nothing; an observer is told what happens. What was trained once is not trained again.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlxgpt import files
from mlxgpt.config import Config, changed_weights, override
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.distributed.group import LOCAL
from mlxgpt.errors import UserError
from mlxgpt.evaluation.loss import evaluate
from mlxgpt.machine import device
from mlxgpt.model.counting import count_parameters
from mlxgpt.storage import run as runs
from mlxgpt.storage.run import Run
from mlxgpt.study import ledger as ledgers
from mlxgpt.study import sequential, verdict
from mlxgpt.study.budget import Budget
from mlxgpt.study.curves import curve
from mlxgpt.study.paired import ALPHA
from mlxgpt.study.planning import Forecasts, plan
from mlxgpt.study.record import Record, Standing, Training
from mlxgpt.study.variants import Variant, must_be_one_text, weights
from mlxgpt.training.callbacks import Callback
from mlxgpt.training.job import TrainJob
from mlxgpt.training.loop import Diverged, train
from mlxgpt.training.resume import find_run, is_finished
from mlxgpt.training.retries import retry_on_gpu_failure


class Observer(Callback):
    """Told of what happens in a comparison, and in each of its trainings."""

    def on_training(self, variant: str, seed: int, steps: int, done: int, total: int) -> None:
        """A training is about to begin or to go on; `done` of about `total` are there."""

    def on_standing(self, record: Record) -> None:
        """So it stands after one more training."""


@dataclass(frozen=True)
class Request:
    """What is to be compared, and how far.

    Attributes:
        seeds: of each variant; where `until_decided`, the most.
        until_decided: add seeds until the interval leaves 0, or reaches less than `smallest` to
            either side.
        final: judge on the validation text, once all is trained.
    """

    name: str
    budget_text: str
    budget: Budget
    seeds: int
    until_decided: bool = False
    smallest: float = 0.0
    final: bool = False


def compare(
    variants: Sequence[Variant], request: Request, folder: Path, observer: Observer
) -> Record:
    """Train what is missing, and judge.

    Args:
        variants: the first is what the others are compared with.
        folder: `runs/compare`.

    Raises:
        UserError: for everything that a user can mend.
    """
    must_be_one_text(variants)
    with files.only_one(folder / request.name, "comparison"):
        (folder / request.name).mkdir(parents=True, exist_ok=True)
        return _Comparison(variants, request, folder, observer).run()


class _Comparison:
    def __init__(
        self, variants: Sequence[Variant], request: Request, folder: Path, observer: Observer
    ) -> None:
        self._request, self._folder, self._observer = request, folder, observer
        self._ledger = ledgers.open_ledger(folder / request.name)
        self._forecasts = Forecasts(folder, observer)
        self._told: set[str] = set()
        self._variants = plan(variants, request.budget, self._ledger, self._forecasts, observer)
        first = self._variants[0]
        # Before their lengths are planned, so that these are what was asked for.
        changes = [weights(variants[0].config, v.config) for v in variants]
        standings = [
            Standing(
                v.name,
                change,
                count_parameters(v.config.model),
                v.config.train.max_steps,
                v.config.train.max_steps * v.config.tokens_per_step,
            )
            for v, change in zip(self._variants, changes, strict=True)
        ]
        self._level = (
            sequential.level(max(1, len(variants) - 1), request.seeds)
            if request.until_decided
            else ALPHA
        )
        self.record = Record(
            request.name,
            request.budget_text,
            first.dataset.name,
            first.dataset.meta.val.bytes,
            "held back",
            self._level,
            request.until_decided,
            f"{device.name()}, {device.backend()}, mlx {version('mlx')}",
            standings,
            looks=self._ledger.looks,
            final_looks=self._ledger.final_looks,
        )

    def run(self) -> Record:
        """Train, judge, and write down."""
        self._train()
        record = self.record
        if not record.interrupted:
            if self._request.final:
                self._judge_on_validation()
            elif not self._ledger.looks or self._ledger.looks[-1] != self._seeds_done():
                self._ledger.looks.append(self._seeds_done())
            self._ledger.save()
            record.looks, record.final_looks = self._ledger.looks, self._ledger.final_looks
        return record

    def _train(self) -> None:
        request = self._request
        steps = ", ".join(f"{s.name} {s.steps:,} steps" for s in self.record.variants)
        seeds = f"{'up to ' * request.until_decided}{request.seeds} seeds"
        self._observer.on_note(f"{seeds} of each: {steps}")
        base = self._variants[0].config.train.seed
        for n in range(request.seeds):
            pairs = list(zip(self._variants, self.record.variants, strict=True))
            still = [pair for pair in pairs if not pair[1].closed]
            if len(still) < 2 and n:
                return  # all are decided
            # Back and forth, so that a machine that becomes slower is so for all alike.
            for variant, standing in still if n % 2 == 0 else still[::-1]:
                training = self._trained(variant, base + n)
                if training is None:
                    self.record.interrupted = True
                    self._judge()
                    return
                standing.trainings.append(training)
                standing.closed |= training.curve is None
                self._judge()
                self._observer.on_standing(self.record)
            if self.record.variants[0].diverged:
                return
            if request.until_decided:
                self._close_what_is_decided()

    def _close_what_is_decided(self) -> None:
        first, *others = self.record.variants
        for other in others:
            if not other.diverged:
                pairs = verdict.pairs(first, other)
                other.closed |= sequential.is_decided(pairs, self._level, self._request.smallest)

    def _judge(self) -> None:
        standings = self.record.variants
        verdict.judge(standings, self._level, sequential=self._request.until_decided)
        self.record.drift = verdict.drift(standings)

    def _trained(self, variant: Variant, seed: int) -> Training | None:
        """One training, taken from the ledger where it is there; None where it was interrupted."""
        config = override(variant.config, {"seed": seed})
        key = ledgers.key(config, variant.dataset)
        if key in self._ledger.diverged:
            return Training(seed, key, math.inf, None)
        folder = self._folder / ledgers.TRAININGS / key
        with files.only_one(folder, "training"):
            run = find_run(folder)
            if run:
                _must_be(run, config, variant.dataset)
            if run and is_finished(run, config):
                self._tell_once("taking up trainings that are there")
            else:
                try:
                    if not self._take_steps(variant, run, config, folder):
                        return None
                except Diverged:
                    self._ledger.diverged.append(key)
                    self._ledger.save()
                    return Training(seed, key, math.inf, None)
        found = curve(runs.open_run(folder))
        return Training(seed, key, found.last, found)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._observer.on_note(line)

    def _take_steps(self, variant: Variant, run: Run | None, config: Config, folder: Path) -> bool:
        """Train; whether it came to its end."""
        forecast = self._forecasts.of(variant)
        done, total = self._counts()
        self._observer.on_training(
            variant.name, config.train.seed, config.train.max_steps, done, total
        )
        job = TrainJob(config, variant.dataset, folder, run, forecast, resumed=run is not None)
        attempt = partial(train, group=LOCAL, callbacks=self._observer)
        summary = retry_on_gpu_failure(attempt, job, LOCAL)
        gc.collect()
        mx.clear_cache()
        return not summary.interrupted

    def _counts(self) -> tuple[int, int]:
        """Trainings that are there, and about all; where it is to be decided, those until the next
        look.
        """
        seeds = self._request.seeds
        if self._request.until_decided:
            seeds = max(sequential.FIRST, self._seeds_done())
        counts = [len(s.trainings) for s in self.record.variants]
        left = [seeds - len(s.trainings) for s in self.record.variants if not s.closed]
        return sum(counts), sum(counts) + max(1, sum(left))

    def _seeds_done(self) -> int:
        return max(len(s.trainings) for s in self.record.variants)

    def _judge_on_validation(self) -> None:
        """Put what the last checkpoints reach on the validation text in the place of what they
        reached on the part held back.
        """
        self._ledger.final_looks += 1
        for variant, standing in zip(self._variants, self.record.variants, strict=True):
            standing.trainings = [
                replace(training, bits_per_byte=self._final(variant.whole, training))
                for training in standing.trainings
            ]
        self.record.judged_on = "validation"
        self._judge()

    def _final(self, whole: Dataset, training: Training) -> float:
        if training.curve is None:
            return math.inf
        run = runs.open_run(self._folder / ledgers.TRAININGS / training.key)
        model, _ = runs.load_model(run, str(run.config.train.max_steps))
        return evaluate(run, model, whole.val).bits_per_byte


def _must_be(run: Run, config: Config, dataset: Dataset) -> None:
    same_data = run.data_fingerprint == dataset.meta.fingerprint
    if not same_data or changed_weights(run.config, config):
        raise UserError(
            f"{run.folder} is not the training of that name",
            "move this folder away; the same command trains it again.",
        )
