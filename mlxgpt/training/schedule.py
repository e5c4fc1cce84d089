"""Learning rate schedules: linear warmup, then cosine or linear decay."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlxgpt.config import Config


def learning_rate_schedule(config: Config) -> Callable[[int], mx.array]:
    """Learning rate as a function of the step, from 0: linear warmup, then decay to `min_lr_ratio`
    of the peak at `decay_steps`, by a cosine or, for `wsd`, linearly over the last `cooldown`
    fraction of them. After that it stays at the minimum.
    """
    o = config.optim
    peak, floor, warmup_steps = o.learning_rate, o.learning_rate * o.min_lr_ratio, o.warmup_steps
    end_step = o.decay_steps or config.train.max_steps
    decay_steps = end_step - warmup_steps
    stable_steps = max(0, round(end_step * (1 - o.cooldown)) - warmup_steps)

    def constant(step: int) -> mx.array:
        return mx.array(floor)

    if decay_steps <= 0:
        decay = constant
    elif o.schedule == "cosine":
        decay = optim.cosine_decay(peak, decay_steps, floor)
    else:
        cooldown = optim.linear_schedule(peak, floor, max(1, decay_steps - stable_steps))
        decay = (
            optim.join_schedules([lambda _: mx.array(peak), cooldown], [stable_steps])
            if stable_steps
            else cooldown
        )
    if not warmup_steps:
        return decay
    warmup = optim.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optim.join_schedules([warmup, decay], [warmup_steps])
