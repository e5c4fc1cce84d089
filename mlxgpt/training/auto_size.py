"""A model size for a training time: how wide, how deep, and in which batches.

A model too large for its time sees too few tokens, one too small has no room for what they say; and
in between the loss is flat. So one rule is enough: of sizes timed here, the largest that still sees
`TOKENS_PER_PARAMETER` of this text in its time; or half as many where the same text comes again and
again, which teaches less than a larger model learns of it. How it was found: benchmarks/modern.md.
"""

from __future__ import annotations

import logging
import math

from mlxgpt.config import Config, override
from mlxgpt.data.dataset import Dataset
from mlxgpt.model.stats import count_parameters
from mlxgpt.training.estimate import Estimate, measure, refuse_by_estimate
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

TOKENS_PER_PARAMETER = 2.0
FRESH_EPOCHS = 4  # of them that teach nearly as much as new text (Muennighoff et al., 2023)
HEAD_SIZE = 64  # as GPT-2's, and one that Metal's fused attention has
ENOUGH_EPOCHS = 5  # more taught nothing that lasts
# Layers and width, each about one and a half times as large as the last: few wide layers take less
# time than many narrow ones.
SHAPES = (
    (2, 128), (2, 192), (2, 256), (2, 320), (3, 320), (3, 384), (4, 448), (4, 512), (5, 640),
    (6, 768), (8, 1024), (10, 1280),
)  # fmt: skip
SMALLEST_STEP, LARGEST_STEP = 2048, 65_536  # tokens
FASTER = 1.4  # a batch twice as large has to give as many times the tokens a second
EVALUATIONS = 10
# What is chosen.
SIZED = ("n_layer", "n_head", "n_embd", "vocab_size", "batch_size", "eval_interval")


def sized(config: Config, dataset: Dataset, seconds: float) -> Config:
    """`config` with the shape and the batch for so many seconds of training on this machine.

    Args:
        config: what is not to be chosen; its vocabulary becomes the data's.

    Raises:
        UserError: if there is no memory for the smallest one.
    """
    logger.info("timing models of different sizes")
    block = config.model.block_size
    smallest = {"batch_size": max(1, SMALLEST_STEP // block), **_shape(*SHAPES[0])}
    chosen = override(config, {"vocab_size": dataset.meta.vocab_size, **smallest})
    found = _timed(chosen, dataset)
    while chosen.train.batch_size * block < LARGEST_STEP:
        larger = override(chosen, {"batch_size": 2 * chosen.train.batch_size})
        estimate = _timed_if_it_fits(larger, dataset)
        # More and smaller steps learn more from as many tokens, as long as they take no longer.
        if not estimate or 2 * found.step_seconds < FASTER * estimate.step_seconds:
            break
        chosen, found = larger, estimate
    for shape in SHAPES[1:]:
        larger = override(chosen, _shape(*shape))
        estimate = _timed_if_it_fits(larger, dataset)
        if not estimate or not _sees_enough(larger, dataset, estimate.steps_in(seconds, larger)):
            break
        chosen, found = larger, estimate
    every = math.ceil(seconds / found.step_seconds / EVALUATIONS)
    m, count = chosen.model, count_parameters(chosen.model)
    epochs = _epochs(chosen, dataset, found.steps_in(seconds, chosen))
    logger.info(
        f"{m.n_layer} layers of width {m.n_embd}, {count:,} parameters, batches of "
        f"{chosen.train.batch_size}: {seconds / 60:g} minutes will be {epochs:.2g} epochs"
    )
    if epochs > ENOUGH_EPOCHS:
        logger.info(
            f"beyond about {ENOUGH_EPOCHS} epochs a model memorizes its text: more text, or "
            "fewer minutes, would do as well"
        )
    return override(chosen, {"eval_interval": every})


def _shape(layers: int, width: int) -> dict[str, int]:
    return {"n_layer": layers, "n_head": width // HEAD_SIZE, "n_embd": width}


def _sees_enough(config: Config, dataset: Dataset, steps: int) -> bool:
    repeated = _epochs(config, dataset, steps) > FRESH_EPOCHS
    enough = TOKENS_PER_PARAMETER / (2 if repeated else 1)
    return steps * config.tokens_per_step / count_parameters(config.model) >= enough


def _epochs(config: Config, dataset: Dataset, steps: int) -> float:
    return steps * config.tokens_per_step / len(dataset.train.ids)


def _timed(config: Config, dataset: Dataset) -> Estimate:
    refuse_by_estimate(config)
    return measure(config, dataset)


def _timed_if_it_fits(config: Config, dataset: Dataset) -> Estimate | None:
    try:
        return _timed(config, dataset)
    except UserError:  # there is no memory for it
        return None
