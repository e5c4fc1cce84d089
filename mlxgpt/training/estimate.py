"""Estimate time and memory of training from a few real steps before it starts, and look up the
results of measured runs of the same shape.
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
from mlxgpt.config import Config, override_config
from mlxgpt.data.dataset import Dataset
from mlxgpt.distributed.group import LOCAL_GROUP, ProcessGroup, measure_all_reduce_seconds
from mlxgpt.model.stats import count_trained_parameters, min_training_bytes
from mlxgpt.training.finetune import InitWeights
from mlxgpt.training.step import TrainStep, make_train_step, take_steps
from mlxgpt.training.validation import (
    count_eval_tokens,
    count_final_eval_tokens,
    make_evaluator,
)
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Estimated time and memory of training, and the result of a measured run of the same shape.

    Attributes:
        step_seconds: seconds per step.
        eval_token_seconds: seconds per evaluated token.
        peak_bytes: peak memory of training.
        val_tokens: tokens in the validation split.
        steps, evaluations: number of remaining steps and evaluations.
        evaluated_tokens: total number of tokens in these evaluations.
        reference: best measured result of this shape on this data; None if unknown.
    """

    step_seconds: float
    eval_token_seconds: float
    peak_bytes: int
    val_tokens: int
    steps: int = 0
    evaluations: int = 0
    evaluated_tokens: int = 0
    reference: ReferenceResult | None = None

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of all evaluations together."""
        return self.evaluated_tokens * self.eval_token_seconds

    @property
    def seconds(self) -> float:
        """Seconds of all steps and evaluations, without samples and checkpoints."""
        return self.steps * self.step_seconds + self.evaluation_seconds

    def to_tree(self) -> dict[str, float | None]:
        """Values stored in the run, to compare with its actual time and memory."""
        return {
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "val_loss": self.reference.val_loss if self.reference else None,
        }

    def for_plan(self, config: Config, start: int = 0) -> Estimate:
        """The estimate for the steps of `config` from `start` on."""
        max_steps, eval_interval = config.train.max_steps, config.train.eval_interval
        evaluations = (
            max_steps // eval_interval - start // eval_interval + (max_steps % eval_interval > 0)
        )
        tokens_per_eval = count_eval_tokens(config, self.val_tokens)
        final_eval_tokens = count_final_eval_tokens(config, self.val_tokens)
        evaluated_tokens = evaluations * tokens_per_eval + (
            final_eval_tokens if final_eval_tokens > tokens_per_eval and evaluations else 0
        )
        return replace(
            self,
            steps=max_steps - start,
            evaluations=evaluations,
            evaluated_tokens=evaluated_tokens,
        )

    def steps_within(self, seconds: float, config: Config) -> int:
        """Number of steps of `config`, with their evaluations, that fit into `seconds`."""

        def estimate_seconds(steps: int) -> float:
            return self.for_plan(override_config(config, {"max_steps": steps})).seconds

        max_steps = int(seconds / self.step_seconds) + 1
        return bisect.bisect_right(range(1, max_steps + 1), seconds, key=estimate_seconds)


@dataclass(frozen=True)
class ReferenceResult:
    """Result of a measured run; see reference_results.toml."""

    val_loss: float
    bits_per_byte: float
    tokens: int
    report: str


NO_ESTIMATE = Estimate(0.0, 0.0, 0, 0)


def estimate_training(
    config: Config,
    dataset: Dataset,
    step_seconds: float | None = None,
    group: ProcessGroup = LOCAL_GROUP,
    init_weights: InitWeights | None = None,
) -> Estimate:
    """Estimate training by running a few steps of a copy and evaluating a few batches.

    Args:
        step_seconds: seconds per step, if known; then one step is run, to measure its memory.
        group: with several ranks, estimates this rank's rows, without the all-reduce.
        init_weights: weights to initialize from.
    """
    _free_memory()  # reference cycles keep the self-check's models alive
    device.reset_peak_memory()
    step_function = make_train_step(config, group.local_group(), init_weights)
    step_seconds, eval_token_seconds = _time_step_and_eval_token(
        step_function, dataset, step_seconds, group
    )
    del step_function
    # While a checkpoint is written, the next steps run with a second copy of weights and moments.
    peak = device.peak_memory_bytes() + 12 * count_trained_parameters(config)
    _free_memory()
    estimate = Estimate(step_seconds, eval_token_seconds, peak, len(dataset.val.ids))
    return replace(estimate.for_plan(config), reference=find_reference_result(config, dataset))


def combine_estimates(group: ProcessGroup, config: Config, local_estimate: Estimate) -> Estimate:
    """Collective. Estimate for all ranks: the slowest rank plus the all-reduce; logs both.

    Args:
        local_estimate: estimate of this rank's rows, without communication.
    """
    if group.size == 1:
        return local_estimate
    step_times, peaks = zip(
        *group.gather("estimate", (local_estimate.step_seconds, local_estimate.peak_bytes)),
        strict=True,
    )
    parameter_count = count_trained_parameters(config)
    dtype: mx.Dtype = getattr(mx, config.train.reduce_dtype)
    averaging_seconds = measure_all_reduce_seconds(group, parameter_count, dtype)
    total_seconds = max(step_times) + averaging_seconds
    if group.is_main:
        rows = config.sequences_per_step
        logger.info(
            f"{group.size} ranks, {rows // group.size} of {rows} sequences each: "
            f"{1000 * max(step_times):,.0f} ms of compute per step, plus "
            f"{1000 * averaging_seconds:,.0f} ms to all-reduce "
            f"{dtype.size * parameter_count / 1e6:,.1f} MB of gradients "
            f"({averaging_seconds / total_seconds:.0%} of the step time)"
        )
    return replace(local_estimate, step_seconds=total_seconds, peak_bytes=max(peaks))


def _free_memory() -> None:
    gc.collect()
    mx.clear_cache()


SLOW_CALL_SECONDS = 10.0  # slower calls are not repeated to exclude compilation


def _time_step_and_eval_token(
    step_function: TrainStep, dataset: Dataset, step_seconds: float | None, group: ProcessGroup
) -> tuple[float, float]:
    """Seconds per step and per evaluated token."""
    config = step_function.config
    accumulation_steps = config.train.gradient_accumulation_steps
    # Two per thread: more need no more memory. Odd micro-batches are not split between threads.
    remainder = config.train.batch_size % execution.thread_count()
    micro_batches = min(accumulation_steps, 2 * execution.thread_count() if remainder else 2)
    if group.size > 1:  # a rank may get whole micro-batches
        micro_batches = accumulation_steps

    def make_step_runner(micro_batches: int) -> Callable[[int], None]:
        def run_steps(steps: int) -> None:
            step_config = override_config(config, {"gradient_accumulation_steps": micro_batches})
            take_steps(step_function, dataset.train, step_config, steps)

        return run_steps

    # The first call includes compilation.
    first_seconds = _time_calls(make_step_runner(micro_batches), 1)
    if step_seconds:
        return step_seconds, step_seconds / dataset.tokens_per_step(config) / 3  # forward only
    step_seconds = first_seconds * accumulation_steps / micro_batches
    if first_seconds < SLOW_CALL_SECONDS:
        step_seconds = _time_per_call(make_step_runner(micro_batches))
        if accumulation_steps > micro_batches:
            half = micro_batches // 2
            half_seconds = _time_per_call(make_step_runner(half))
            micro_batch_seconds = max(0.0, step_seconds - half_seconds) / half
            step_seconds += micro_batch_seconds * (accumulation_steps - micro_batches)
    return step_seconds, _time_eval_token(step_function, config, dataset)


def _time_eval_token(step_function: TrainStep, config: Config, dataset: Dataset) -> float:
    reference = step_function.model.parameters()
    evaluator = make_evaluator(dataset, step_function, dataset.tokenizer.end_of_text, reference)(
        limit=max(config.train.batch_size, execution.thread_count()) * config.model.block_size
    )

    def evaluate(repeats: int) -> None:
        for _ in range(repeats):
            evaluator()

    seconds = _time_calls(evaluate, 1)
    if seconds <= SLOW_CALL_SECONDS:
        seconds = _time_per_call(evaluate)
    return seconds / evaluator.tokens


MAX_TIMED_REPEATS = 20
TIMING_SECONDS = 2.0  # target for all timed repeats together


def _time_per_call(work: Callable[[int], None]) -> float:
    """Seconds per repeat, averaged over several; `work(n)` does n repeats."""
    first_seconds = _time_calls(work, 1)
    repeats = min(MAX_TIMED_REPEATS, int(TIMING_SECONDS / first_seconds))
    return _time_calls(work, repeats) / repeats if repeats > 1 else first_seconds


def _time_calls(work: Callable[[int], None], repeats: int) -> float:
    start_time = time.monotonic()
    work(repeats)
    return time.monotonic() - start_time


def check_estimated_memory(config: Config, ranks: int = 1, limit: int | None = None) -> None:
    """Check, before timing anything, that training should fit into memory; raises UserError.

    Args:
        limit: bytes available; default: the free memory of the device.
    """
    if limit is None:
        library_bytes = memory_limits.MIN_RESIDENT if device.on_cpu() else 0
        limit = max(0, device.free_memory_bytes() - library_bytes)
    check_memory_limit(config, estimate_memory_bytes(config, ranks), limit)


def check_memory_limit(config: Config, required_bytes: int, limit: int) -> None:
    """Check that training fits into memory; raises UserError with a setting that would fit.

    Args:
        required_bytes: measured or estimated memory of training.
        limit: bytes available.
    """
    if required_bytes <= limit:
        return
    raise UserError(
        f"training needs {required_bytes / 1e9:,.2f} GB of memory, but the limit is "
        f"{limit / 1e9:,.2f} GB",
        _suggest_smaller_setting(config, required_bytes, limit),
    )


MEMORY_MARGIN = 1.1  # safety factor on the memory of a suggested setting


def _suggest_smaller_setting(config: Config, required_bytes: int, limit: int) -> str:
    """Suggest a setting that fits, assuming that activation memory is proportional to the number of
    sequences computed at the same time.
    """
    t = config.train
    fixed_bytes = min_training_bytes(config)
    bytes_per_sequence = max(1.0, (required_bytes - fixed_bytes) / _concurrent_sequences(config))
    max_sequences = int((limit / MEMORY_MARGIN - fixed_bytes) / bytes_per_sequence)
    divisors = [n for n in range(1, t.batch_size) if t.batch_size % n == 0]
    fitting_batch_sizes = [
        n
        for n in divisors
        if _concurrent_sequences(override_config(config, {"batch_size": n})) <= max_sequences
    ]
    if fitting_batch_sizes:
        batch_size = fitting_batch_sizes[-1]
        accumulation_steps = t.gradient_accumulation_steps * (t.batch_size // batch_size)
        return (
            f"use --batch-size {batch_size} --gradient-accumulation-steps {accumulation_steps}, "
            "which gives the same effective batch size."
        )
    if not t.gradient_checkpointing and max_sequences >= 0:
        return "use --batch-size 1 --gradient-checkpointing, or a smaller --block-size."
    for layers in range(config.model.n_layer - 1, 0, -1):
        if required_bytes * layers / config.model.n_layer < limit / MEMORY_MARGIN:
            return f"use a smaller model, such as --n-layer {layers}."
    return "use a smaller --n-embd or --n-layer; mlxgpt info shows the model's size."


def check_model_memory(config: Config) -> None:
    """Check that a model can be trained in this machine's memory at all, whatever the batch size.

    Raises:
        UserError: if weights, gradients and AdamW's two moments alone exceed it.
    """
    required_bytes, total_bytes = min_training_bytes(config), device.total_memory_bytes()
    if required_bytes > total_bytes:
        raise UserError(
            f"training this model needs at least {required_bytes / 1e9:,.1f} GB of memory, but "
            f"this machine has {total_bytes / 1e9:,.1f} GB",
            "use a smaller --n-embd or --n-layer.",
        )


def estimate_memory_bytes(config: Config, ranks: int = 1) -> int:
    """Estimate the memory of training in bytes, without running it: weights, gradients, optimizer
    moments, and the activations of a micro-batch or of a rank's share.
    """
    m, t = config.model, config.train
    sequences = min(_concurrent_sequences(config), config.sequences_per_step // ranks)
    tokens = sequences * _max_row_length(config)
    layers = 1 if t.gradient_checkpointing else m.n_layer
    # Per token, a block keeps about 18 vectors of n_embd, and 3 rows of attention per head.
    activation_count = tokens * (
        layers * (18 * m.n_embd + 3 * m.n_head * m.block_size) + 3 * m.vocab_size
    )
    return min_training_bytes(config) + activation_count * (4 if t.dtype == "float32" else 2)


def _concurrent_sequences(config: Config) -> int:
    """Sequences of a micro-batch that are in memory at the same time."""
    batch = config.train.batch_size
    return batch // execution.chunks_per_thread(batch, _max_row_length(config))


def _max_row_length(config: Config) -> int:
    """Tokens in a row of a batch, at most; a preference pair is a row of two answers."""
    return config.model.block_size * (2 if config.train.beta else 1)


def find_reference_result(config: Config, dataset: Dataset) -> ReferenceResult | None:
    """Best measured result of this shape and optimizer on this data, if there is one; none for
    LoRA, as those are of models trained from scratch.
    """
    if config.lora.lora_rank:
        return None
    path = Path(__file__).parent / "reference_results.toml"
    tree = tomllib.loads(path.read_text(encoding="utf-8"))
    m = config.model
    shape = [m.n_layer, m.n_head, m.n_embd, m.block_size, m.vocab_size]
    results = [
        ReferenceResult(run["val_loss"], run["bits_per_byte"], run["tokens"], run["report"])
        for run in tree["run"]
        if run["shape"] == shape
        and run.get("optimizer", "adamw") == config.optim.optimizer
        and run["data"] == dataset.meta.fingerprint
    ]
    return min(results, key=lambda run: run.val_loss, default=None)
