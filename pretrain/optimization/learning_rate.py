"""Learning rate of every step."""

from __future__ import annotations

import math

from pretrain.settings.optimizer import Schedule


def learning_rate_at(step: int, *, peak: float, schedule: Schedule) -> float:
    """Returns the learning rate of a step: linear warm-up, then the schedule's shape.

    Args:
        step: number of the step, from 0.
        peak: learning rate after warm-up.
        schedule: config section `schedule`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.shape == "cosine":
        steps_after_warmup = schedule.num_steps - schedule.warmup_steps
        progress = (step - schedule.warmup_steps) / steps_after_warmup
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.shape == "constant_with_cooldown":
        return peak * min(1.0, (schedule.num_steps - step) / schedule.cooldown_steps)
    return peak
