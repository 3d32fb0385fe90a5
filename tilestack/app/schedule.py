"""The learning rate, step by step."""

from __future__ import annotations

import math

from tilestack.app.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up to `peak`, then the decay.

    The cosine is that of Loshchilov and Hutter (2017) without restarts, down to final_ratio * peak at the last step.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.decay == "cosine" else 1 - done
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * left)
