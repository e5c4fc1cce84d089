"""Choose model size and batch size for a training time.

A model too large for the time sees too few tokens, one too small lacks capacity, and in between the
loss is nearly flat. So one rule is enough: of the sizes timed on this machine, take the largest
that still sees `TOKENS_PER_PARAMETER` tokens per parameter. Half as many are enough beyond
`MAX_EFFECTIVE_EPOCHS`, where repeated data helps less than a larger model. Measured with the
modern recipe in benchmarks/notes/modern.md; racing uses the same rule. A scaling law of the text,
from `mlxgpt scale`, replaces the rule.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from mlxgpt.config import Config, override_config
from mlxgpt.config.resolve import resolve_config
from mlxgpt.data.dataset import Dataset
from mlxgpt.model.stats import count_parameters
from mlxgpt.training.estimate import Estimate, check_estimated_memory, estimate_training
from mlxgpt.training.scaling_law import ScalingLaw
from mlxgpt.utils.errors import UserError

logger = logging.getLogger(__name__)

# Config fields that `choose_model_size` sets.
AUTO_SIZED_FIELDS = ("n_layer", "n_head", "n_embd", "vocab_size", "batch_size", "eval_interval")


# (n_layer, n_embd), each model about 1.5 times as large as the one before.
MODEL_SIZES = (
    (2, 128), (2, 192), (2, 256), (2, 320), (3, 320), (3, 384), (4, 448), (4, 512), (5, 640),
    (6, 768), (8, 1024), (10, 1280),
)  # fmt: skip
MIN_STEP_TOKENS, MAX_STEP_TOKENS = 2048, 65_536  # tokens per step; doubled in between
MIN_BATCH_SPEEDUP = 1.4  # speedup in tokens/s that doubling the batch must give
OVERFIT_EPOCHS = 5  # longer runs ended with a higher validation loss (benchmarks/notes/modern.md)
EVALUATIONS_PER_RUN = 10

DEFAULT_VOCAB_SIZE = 2048


def resolve_auto_size(recipe: str, command: str, settings: Mapping[str, Any]) -> Config:
    """Config of a recipe without a size, for `choose_model_size`.

    Args:
        command: what chooses the size, for errors.
        settings: other config fields.

    Raises:
        UserError: for the classic recipe, or if the settings contain a size.
    """
    if recipe == "classic":
        raise UserError(
            f"{command} does not choose a model size for --recipe classic",
            "use --recipe modern or racing, or train with --tier 1 or --tier 2.",
        )
    if size_settings := [
        name for name in AUTO_SIZED_FIELDS if name in settings and name != "vocab_size"
    ]:
        raise UserError(
            f"{size_settings[0]} is set, but {command} chooses it",
            "omit it, or train with --tier 2, which sets a model size.",
        )
    if recipe == "racing":
        logger.info("recipe racing: only mlxgpt runs the model; exports need --recipe modern")
    _, config = resolve_config(2, None, recipe, **{"vocab_size": DEFAULT_VOCAB_SIZE, **settings})
    return config


def choose_model_size(
    config: Config, dataset: Dataset, seconds: float, law: ScalingLaw | None = None
) -> Config:
    """Choose model size and batch size for a training time on this machine. Models have few wide
    layers, which run faster than many narrow ones.

    Args:
        config: all other settings; the vocabulary size is taken from the data.
        seconds: training time.
        law: of this text and architecture: the size with the lowest loss by it is chosen, unless
            the text would be seen more than MAX_EFFECTIVE_EPOCHS times.

    Raises:
        UserError: if the smallest model does not fit into memory.
    """
    logger.info("benchmarking candidate model sizes")
    block_size = config.model.block_size
    overrides = {
        "batch_size": max(1, MIN_STEP_TOKENS // block_size),
        **shape_overrides(*MODEL_SIZES[0]),
    }
    best_config = override_config(config, {"vocab_size": dataset.meta.vocab_size, **overrides})
    best_estimate = _estimate_config(best_config, dataset)
    while best_config.train.batch_size * block_size < MAX_STEP_TOKENS:
        larger_config = override_config(
            best_config, {"batch_size": 2 * best_config.train.batch_size}
        )
        estimate = _estimate_config_or_none(larger_config, dataset)
        # Per token, more and smaller steps learn more, so double the batch only if it is faster.
        if (
            not estimate
            or 2 * best_estimate.step_seconds < MIN_BATCH_SPEEDUP * estimate.step_seconds
        ):
            break
        best_config, best_estimate = larger_config, estimate
    for shape in MODEL_SIZES[1:]:
        larger_config = override_config(best_config, shape_overrides(*shape))
        estimate = _estimate_config_or_none(larger_config, dataset)
        if not estimate:
            break
        steps = best_estimate.steps_within(seconds, best_config)
        larger_steps = estimate.steps_within(seconds, larger_config)
        if law and _count_epochs(best_config, dataset, steps) <= MAX_EFFECTIVE_EPOCHS:
            losses = (_predict(law, best_config, steps), _predict(law, larger_config, larger_steps))
            if losses[1] >= losses[0]:
                break
        elif not _sees_enough_tokens(larger_config, dataset, larger_steps):
            break
        best_config, best_estimate = larger_config, estimate
    if law:
        steps = best_estimate.steps_within(seconds, best_config)
        loss = _predict(law, best_config, steps)
        logger.info(f"predicted by the scaling law of this text: {loss:.3f} bits per byte")
    eval_interval = math.ceil(seconds / best_estimate.step_seconds / EVALUATIONS_PER_RUN)
    m, parameter_count = best_config.model, count_parameters(best_config.model)
    epochs = _count_epochs(best_config, dataset, best_estimate.steps_within(seconds, best_config))
    logger.info(
        f"model size: {m.n_layer} layers, n_embd {m.n_embd}, {parameter_count:,} parameters, batch "
        f"size {best_config.train.batch_size}; estimated {epochs:.2g} epochs in {seconds / 60:g} "
        "minutes"
    )
    if epochs > OVERFIT_EPOCHS:
        logger.info(
            f"more than about {OVERFIT_EPOCHS} epochs will overfit: use a larger dataset, or "
            "train for fewer minutes"
        )
    return override_config(best_config, {"eval_interval": eval_interval})


HEAD_SIZE = 64  # as in GPT-2, and supported by Metal's fused attention


def shape_overrides(layers: int, width: int) -> dict[str, int]:
    return {"n_layer": layers, "n_head": width // HEAD_SIZE, "n_embd": width}


TOKENS_PER_PARAMETER = 2.0  # measured in benchmarks/notes/modern.md
MAX_EFFECTIVE_EPOCHS = 4  # repeats nearly as good as new data (Muennighoff et al., 2023)


def _sees_enough_tokens(config: Config, dataset: Dataset, steps: int) -> bool:
    is_repeated = _count_epochs(config, dataset, steps) > MAX_EFFECTIVE_EPOCHS
    min_tokens_per_parameter = TOKENS_PER_PARAMETER / (2 if is_repeated else 1)
    tokens_per_parameter = steps * config.tokens_per_step / count_parameters(config.model)
    return tokens_per_parameter >= min_tokens_per_parameter


def _predict(law: ScalingLaw, config: Config, steps: int) -> float:
    return law.predict(count_parameters(config.model), max(1, steps) * config.tokens_per_step)


def _count_epochs(config: Config, dataset: Dataset, steps: int) -> float:
    return steps * config.tokens_per_step / len(dataset.train.ids)


def _estimate_config(config: Config, dataset: Dataset) -> Estimate:
    check_estimated_memory(config)
    return estimate_training(config, dataset)


def _estimate_config_or_none(config: Config, dataset: Dataset) -> Estimate | None:
    try:
        return _estimate_config(config, dataset)
    except UserError:  # does not fit into memory
        return None
