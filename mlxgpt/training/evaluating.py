"""How much of the validation text a training's evaluations read: decided by counts, not by clocks,
so that it is the same on every machine and after every interruption.
"""

from __future__ import annotations

from mlxgpt.config import Config

SHARE = 0.15  # of the tokens trained on, which is 5 % of the time: a step is three forward passes
LEAST = 8192  # tokens: fewer would say nothing


def tokens_each(config: Config, there: int) -> int:
    """Tokens of an evaluation on the way, of the `there` that the validation text has."""
    t = config.train
    return min(there, t.eval_tokens or _share(config, min(t.eval_interval, t.max_steps)))


def tokens_at_end(config: Config, there: int) -> int:
    """Tokens of the one at the end: all, unless the training was too short for that."""
    return min(there, max(_share(config, config.train.max_steps), tokens_each(config, there)))


def _share(config: Config, steps: int) -> int:
    return max(LEAST, int(SHARE * steps * config.tokens_per_step))
