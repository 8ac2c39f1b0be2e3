"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, warmup: int, final_fraction: float) -> float:
    """Fraction of the peak learning rate for 0-based `step`: linear warm-up, then cosine to the floor.

    The schedule of the reference code (FAIR 2024): the first step already learns, the last is at the floor
    (of a single step after the warm-up, which is both peak and end, the peak).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
