"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math

from mobilellm.train.settings import ScheduleSettings


def learning_rate_factor(step: int, steps: int, settings: ScheduleSettings) -> float:
    """Fraction of the peak learning rate for 0-based `step` of `steps`: linear warm-up, then as named.

    cosine: to the floor (the reference code, FAIR 2024). linear: straight down to the floor. wsd: at the peak
    until the last `decay_fraction` of the steps, then straight down (Hu et al. 2024, MiniCPM). The first step
    already learns, the last is at the floor (of a single step after the warm-up, which is both peak and end,
    the peak).
    """
    warmup, floor = settings.warmup_steps, settings.final_fraction
    if step < warmup:
        return (step + 1) / warmup
    start = warmup
    if settings.name == "wsd":
        start = max(warmup, steps - 1 - max(1, round(settings.decay_fraction * steps)))
    progress = min(1.0, max(0, step - start) / max(1, steps - 1 - start))
    if settings.name == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1 - (1 - floor) * progress
