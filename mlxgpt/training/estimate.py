"""Estimate of what training takes here, before it starts: the time and memory of a few real steps;
and what measured runs of the same shape reached.
"""

from __future__ import annotations

import bisect
import gc
import logging
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.backend import device, execution, memory_limits
from mlxgpt.config import Config, override
from mlxgpt.data.dataset import Dataset
from mlxgpt.distributed.group import LOCAL, ProcessGroup, measure_average_seconds
from mlxgpt.evaluation.loss import EvalText, Evaluator, eval_step
from mlxgpt.model.stats import count_parameters, training_bytes
from mlxgpt.training.step import TrainStep, new_step, take_steps
from mlxgpt.training.validation import tokens_at_end, tokens_each
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

MOST_STEPS = 20  # timed at a stretch
ENOUGH_SECONDS = 2.0
LONG_SECONDS = 10.0  # what takes as long is not taken twice, only to leave compiling out
MARGIN = 1.1  # of a setting that is said to fit


@dataclass(frozen=True)
class Estimate:
    """What training takes.

    Attributes:
        step_seconds: of one step.
        token_seconds: of a token that is evaluated.
        peak_bytes: the most memory in use, measured.
        val_tokens: of the validation text.
        steps, evaluations: how many are to come.
        evaluated: tokens that these evaluations predict, together.
        reached: what measured runs of this shape reached on this text; None if unknown.
    """

    step_seconds: float
    token_seconds: float
    peak_bytes: int
    val_tokens: int
    steps: int = 0
    evaluations: int = 0
    evaluated: int = 0
    reached: Reached | None = None

    @property
    def evaluation_seconds(self) -> float:
        """Of all evaluations together."""
        return self.evaluated * self.token_seconds

    @property
    def seconds(self) -> float:
        """Of the whole run; samples and checkpoints are not counted."""
        return self.steps * self.step_seconds + self.evaluation_seconds

    def to_tree(self) -> dict[str, float | None]:
        """What a run keeps of it, to compare with what it really took."""
        return {
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "val_loss": self.reached.val_loss if self.reached else None,
        }

    def for_plan(self, config: Config, start: int = 0) -> Estimate:
        """The same for the steps from `start` on."""
        last, every = config.train.max_steps, config.train.eval_interval
        evaluations = last // every - start // every + (last % every > 0)
        each = tokens_each(config, self.val_tokens)
        at_end = tokens_at_end(config, self.val_tokens)
        evaluated = evaluations * each + (at_end if at_end > each and evaluations else 0)
        return replace(self, steps=last - start, evaluations=evaluations, evaluated=evaluated)

    def steps_in(self, seconds: float, config: Config) -> int:
        """How many steps of `config` fit into a time, with their evaluations."""

        def needed(steps: int) -> float:
            return self.for_plan(override(config, {"max_steps": steps})).seconds

        most = int(seconds / self.step_seconds) + 1
        return bisect.bisect_right(range(1, most + 1), seconds, key=needed)


@dataclass(frozen=True)
class Reached:
    """What a measured run reached: see measured.toml."""

    val_loss: float
    bits_per_byte: float
    tokens: int
    report: str


NO_ESTIMATE = Estimate(0.0, 0.0, 0, 0)


def measure(
    config: Config,
    dataset: Dataset,
    step_seconds: float | None = None,
    group: ProcessGroup = LOCAL,
) -> Estimate:
    """Take a few steps of a copy, and evaluate a few batches.

    Args:
        step_seconds: of a step, if that is known: then one is taken, to measure its memory.
        group: then of this rank's rows, without averaging.
    """
    _collect()  # models that were checked go in circles, and would be weighed too
    device.reset_peak()
    step_seconds, token_seconds = _measured(config, dataset, step_seconds, group)
    # A checkpoint being written holds on to weights and moments while the next step is taken.
    peak = device.peak_bytes() + training_bytes(config.model) * 3 // 4
    _collect()
    found = Estimate(step_seconds, token_seconds, peak, len(dataset.val.ids))
    return replace(found.for_plan(config), reached=reached(config, dataset))


def combine(group: ProcessGroup, config: Config, own: Estimate) -> Estimate:
    """The estimate for all ranks, of which the slowest decides; logged, with what averaging takes.

    Args:
        own: of this rank's rows, as if it were alone.
    """
    if group.size == 1:
        return own
    steps, peaks = zip(*group.gather("estimate", (own.step_seconds, own.peak_bytes)), strict=True)
    values = count_parameters(config.model)
    dtype: mx.Dtype = getattr(mx, config.train.reduce_dtype)
    averaging = measure_average_seconds(group, values, dtype)
    whole = max(steps) + averaging
    if group.is_main:
        rows = config.sequences_per_step
        logger.info(
            f"{group.size} ranks, {rows // group.size} of {rows} sequences each: "
            f"{1000 * max(steps):,.0f} ms a step, and {1000 * averaging:,.0f} ms to average "
            f"{dtype.size * values / 1e6:,.1f} MB of gradients, {averaging / whole:.0%} of all"
        )
    return replace(own, step_seconds=whole, peak_bytes=max(peaks))


def _collect() -> None:
    gc.collect()
    mx.clear_cache()


def _measured(
    config: Config, dataset: Dataset, step_seconds: float | None, group: ProcessGroup
) -> tuple[float, float]:
    """Seconds of a step, and of an evaluated token."""
    step_function = new_step(config, group.local())
    all_of_them = config.train.gradient_accumulation_steps
    # Two for each thread, as more take no more memory; a thread has the whole of an odd one.
    odd = config.train.batch_size % execution.thread_count()
    micro_batches = min(all_of_them, 2 * execution.thread_count() if odd else 2)
    if group.size > 1:  # a rank may have whole micro-batches
        micro_batches = all_of_them

    def steps_of(micro_batches: int) -> Callable[[int], None]:
        def take(steps: int) -> None:
            changed = override(config, {"gradient_accumulation_steps": micro_batches})
            take_steps(step_function, dataset.train, changed, steps)

        return take

    first = _seconds(steps_of(micro_batches), 1)  # compiles what the training runs
    if step_seconds:
        return step_seconds, step_seconds / config.tokens_per_step / 3  # of three passes it is one
    step_seconds = first * all_of_them / micro_batches
    if first < LONG_SECONDS:
        step_seconds = _timed(steps_of(micro_batches))
        if all_of_them > micro_batches:
            fewer = micro_batches // 2
            another = max(0.0, step_seconds - _timed(steps_of(fewer))) / fewer
            step_seconds += another * (all_of_them - micro_batches)
    return step_seconds, _token_seconds(step_function, config, dataset)


def _token_seconds(step_function: TrainStep, config: Config, dataset: Dataset) -> float:
    evaluator = Evaluator(
        step_function.model,
        EvalText(dataset.val, dataset.tokenizer, dataset.tokenizer.end_of_text),
        eval_step(step_function.model, step_function.dtype),
        batch_size=config.train.batch_size,
        limit=max(config.train.batch_size, execution.thread_count()) * config.model.block_size,
    )

    def evaluate(times: int) -> None:
        for _ in range(times):
            evaluator()

    first = _seconds(evaluate, 1)
    return (first if first > LONG_SECONDS else _timed(evaluate)) / evaluator.tokens


def _timed(work: Callable[[int], None]) -> float:
    """Seconds that `work(n)` takes for each of n, as many at a stretch as are enough."""
    once = _seconds(work, 1)
    times = min(MOST_STEPS, int(ENOUGH_SECONDS / once))
    return _seconds(work, times) / times if times > 1 else once


def _seconds(work: Callable[[int], None], times: int) -> float:
    began = time.monotonic()
    work(times)
    return time.monotonic() - began


def refuse_by_estimate(config: Config, ranks: int = 1, limit: int | None = None) -> None:
    """Refuse, before anything is timed, a training that takes more memory than there is by our
    estimate. See `refuse_too_large`.

    Args:
        limit: bytes that it may take; default: what the device has left for a model.
    """
    if limit is None:
        libraries = memory_limits.RESIDENT if device.on_cpu() else 0
        limit = max(0, device.free_bytes() - libraries)
    refuse_too_large(config, estimated_bytes(config, ranks), limit)


def refuse_too_large(config: Config, need: int, limit: int) -> None:
    """Refuse a training that takes more memory than there is, and say which setting would fit.

    Args:
        need: bytes that it takes, measured or estimated.
        limit: bytes that there are, or that it may take.
    """
    if need <= limit:
        return
    raise UserError(
        f"this training takes {need / 1e9:,.2f} GB, and has {limit / 1e9:,.2f}",
        _fitting(config, need, limit),
    )


def _fitting(config: Config, need: int, limit: int) -> str:
    """Which setting would fit, taking the memory beside the model's own to grow with what is
    computed at once.
    """
    t = config.train
    fixed = training_bytes(config.model)
    each = max(1.0, (need - fixed) / _at_once(config))
    most = int((limit / MARGIN - fixed) / each)
    divisors = [n for n in range(1, t.batch_size) if t.batch_size % n == 0]
    smaller = [n for n in divisors if _at_once(override(config, {"batch_size": n})) <= most]
    if smaller:
        accumulate = t.gradient_accumulation_steps * (t.batch_size // smaller[-1])
        return (
            f"use --batch-size {smaller[-1]} --gradient-accumulation-steps {accumulate}, "
            "which trains the same."
        )
    if not t.gradient_checkpointing and most >= 0:
        return "use --batch-size 1 --gradient-checkpointing, or a smaller --block-size."
    for layers in range(config.model.n_layer - 1, 0, -1):
        if need * layers / config.model.n_layer < limit / MARGIN:
            return f"use a smaller model, such as --n-layer {layers}."
    return "use a smaller --n-embd and --n-layer: mlxgpt info tells what they take."


def must_fit(config: Config) -> None:
    """Refuse a model whose training cannot fit into this machine's memory, whatever the batch.

    Raises:
        UserError: if weights, gradients and AdamW's two moments alone are larger than it.
    """
    need, have = training_bytes(config.model), device.total_bytes()
    if need > have:
        raise UserError(
            f"this model needs {need / 1e9:,.1f} GB to be trained, and there are {have / 1e9:,.1f}",
            "use a smaller --n-embd or --n-layer.",
        )


def estimated_bytes(config: Config, ranks: int = 1) -> int:
    """About the memory of a training, to refuse what cannot fit before it is tried: weights,
    gradients, moments, and what the backward pass needs of a micro-batch, or of a rank's share.
    """
    m, t = config.model, config.train
    tokens = min(_at_once(config), config.sequences_per_step // ranks) * m.block_size
    layers = 1 if t.gradient_checkpointing else m.n_layer
    # A block keeps some eighteen vectors of a token, and three rows of each head's weights.
    numbers = tokens * (layers * (18 * m.n_embd + 3 * m.n_head * m.block_size) + 3 * m.vocab_size)
    return training_bytes(m) + numbers * (4 if t.dtype == "float32" else 2)


def _at_once(config: Config) -> int:
    """Sequences of a batch that are in memory at the same time."""
    batch = config.train.batch_size
    return batch // execution.portions(batch, config.model.block_size)


def reached(config: Config, dataset: Dataset) -> Reached | None:
    """What the best measured run of this shape reached on this text, if there is one."""
    tree = tomllib.loads((Path(__file__).parent / "measured.toml").read_text(encoding="utf-8"))
    m = config.model
    shape = [m.n_layer, m.n_head, m.n_embd, m.block_size, m.vocab_size]
    runs = [
        Reached(run["val_loss"], run["bits_per_byte"], run["tokens"], run["report"])
        for run in tree["run"]
        if run["shape"] == shape
        and run.get("optimizer", "adamw") == config.optim.optimizer
        and run["data"] == dataset.meta.fingerprint
    ]
    return min(runs, key=lambda run: run.val_loss, default=None)
