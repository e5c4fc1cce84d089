"""What a training will take on this machine, before it begins: a few real steps, timed and weighed;
and what measured runs of the same shape reached.
"""

from __future__ import annotations

import gc
import math
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlxgpt.config import Config, ModelConfig, override
from mlxgpt.corpus.dataset import Dataset
from mlxgpt.corpus.tokens import Tokens
from mlxgpt.errors import UserError
from mlxgpt.evaluation.loss import Evaluator
from mlxgpt.machine import device
from mlxgpt.model.gpt import count_parameters
from mlxgpt.training.step import TrainStep, new_step
from mlxgpt.training.trainer import Hook, Metrics, train

WARM_UP = 2  # steps, which compile
MOST_STEPS = 20  # timed
FEWEST_STEPS = 2
ENOUGH_SECONDS = 2.0
EVALUATED_BATCHES = 4
MARGIN = 1.1  # of a setting that is said to fit


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        step_seconds: of one step, measured.
        evaluation_seconds: of one evaluation, from a few measured batches.
        peak_bytes: the most memory in use, measured.
        steps, evaluations: how many are to come.
        reached: what measured runs of this shape reached on this text; None: unknown.
    """

    step_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    steps: int
    evaluations: int
    reached: Reached | None = None

    @property
    def seconds(self) -> float:
        """Of the whole training; its samples and checkpoints are not counted."""
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    def for_plan(self, config: Config, start: int = 0) -> Forecast:
        """The same for the steps from `start` on."""
        last, every = config.train.max_steps, config.train.eval_interval
        evaluations = last // every - start // every + (last % every > 0)
        return replace(self, steps=last - start, evaluations=evaluations)

    def steps_in(self, seconds: float, every: int) -> int:
        """How many steps, with an evaluation each `every` and at the end, fit into a time."""
        left = seconds - self.evaluation_seconds  # of the one at the end
        return max(1, int(left / (self.step_seconds + self.evaluation_seconds / every)))


@dataclass(frozen=True)
class Reached:
    """What a run reached that was measured: see measured.toml."""

    val_loss: float
    bits_per_byte: float
    tokens: int
    report: str


def measure(config: Config, dataset: Dataset, start: int = 0) -> Forecast:
    """Take a few steps of a copy, and evaluate a few batches."""
    device.reset_peak()
    trial = override(config, {"max_steps": WARM_UP + MOST_STEPS})
    step_function = new_step(trial)
    times: list[float] = []

    def clock(metrics: Metrics) -> None:
        times.append(metrics.seconds)

    def enough() -> bool:
        timed = len(times) - WARM_UP
        return timed >= FEWEST_STEPS and times[-1] - times[WARM_UP - 1] > ENOUGH_SECONDS

    train(step_function, dataset.train, trial, hooks=[Hook(lambda step: True, clock)], stop=enough)
    step_seconds = (times[-1] - times[WARM_UP - 1]) / (len(times) - WARM_UP)
    evaluation_seconds = _evaluation_seconds(step_function, config, dataset)
    # A checkpoint being written holds on to weights and moments while the next step is taken.
    peak = device.peak_bytes() + training_bytes(config.model) * 3 // 4
    del step_function
    gc.collect()
    mx.clear_cache()
    measured = Forecast(step_seconds, evaluation_seconds, peak, 0, 0, reached(config, dataset))
    return measured.for_plan(config, start)


def _evaluation_seconds(step_function: TrainStep, config: Config, dataset: Dataset) -> float:
    batch = config.train.batch_size * config.model.block_size
    ids = dataset.val.ids[: EVALUATED_BATCHES * batch]
    evaluator = Evaluator(
        step_function.model,
        dataset.tokenizer,
        Tokens(ids, dataset.val.vocab_size),
        len(ids),  # what it is divided by does not matter here
        bos=dataset.tokenizer.end_of_text,
        batch_size=config.train.batch_size,
        dtype=step_function.dtype,
    )
    evaluator()  # compiles
    began = time.monotonic()
    evaluator()
    batches = math.ceil(len(dataset.val.ids) / batch) / math.ceil(len(ids) / batch)
    return (time.monotonic() - began) * batches


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
    """Which setting would fit, taking the memory beside the model's own to grow with the batch."""
    t = config.train
    fixed = training_bytes(config.model)
    each = max(1.0, (need - fixed) / t.batch_size)
    most = int((limit / MARGIN - fixed) / each)
    smaller = [n for n in range(1, t.batch_size) if t.batch_size % n == 0 and n <= most]
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


def training_bytes(model: ModelConfig) -> int:
    """Least memory of a training: weights, gradients and AdamW's two moments, in float32."""
    return 16 * count_parameters(model)


def estimated_bytes(config: Config) -> int:
    """About the memory of a training, to refuse what cannot fit before it is tried: weights,
    gradients, moments, and what the backward pass needs of a micro-batch.
    """
    m, t = config.model, config.train
    tokens = t.batch_size * m.block_size
    layers = 1 if t.gradient_checkpointing else m.n_layer
    # A block keeps some eighteen vectors of a token, and three rows of each head's weights.
    numbers = tokens * (layers * (18 * m.n_embd + 3 * m.n_head * m.block_size) + 3 * m.vocab_size)
    return training_bytes(m) + numbers * (4 if t.dtype == "float32" else 2)


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
