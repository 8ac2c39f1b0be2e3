"""When to stop a run that goes wrong, and what to write down about it."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from mobilellm.atomic import atomic_write
from mobilellm.train.settings import GuardSettings

_ENOUGH = 10
"""Losses that must have been seen before one can be called a spike, if the window holds so many."""


class TrainingError(ValueError):
    """Training cannot go on; the message says where and what to try."""


class Guard:
    """Looks at every step before the weights change, and stops the run with the batch's address."""

    def __init__(self, settings: GuardSettings, directory: Path, is_first: bool = True) -> None:
        self._settings, self._directory, self._is_first = settings, directory, is_first
        self._losses: deque[float] = deque(maxlen=settings.window)

    @property
    def losses(self) -> tuple[float, ...]:
        """Those of the window, for a checkpoint."""
        return tuple(self._losses)

    def restore(self, losses: Iterable[float]) -> None:
        """Go on after `losses`, of which the window keeps the last."""
        self._losses.clear()
        self._losses.extend(losses)

    def check(self, step: int, loss: float, norm: float, address: dict[str, Any], lr: float) -> None:
        """Raise TrainingError for a loss or gradient that is not finite, or a loss that jumps."""
        enough = len(self._losses) >= min(_ENOUGH, self._settings.window)
        usual = median(self._losses) if enough else math.inf
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"loss {loss} and gradient norm {norm} are not both finite"
        elif self._settings.spike_factor and loss > self._settings.spike_factor * usual:
            what = (
                f"loss {loss:.4f} is more than {self._settings.spike_factor:g} times the usual {usual:.4f} "
                "(guard.spike_factor)"
            )
        else:
            self._losses.append(loss)
            return
        file = self._directory / "bad-batch.json"
        if self._is_first:
            record = {
                "step": step,
                "reason": what,
                "loss": str(loss),
                "gradient_norm": str(norm),
                "batch": address,
            }
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        raise TrainingError(
            f"step {step}: {what}; the batch's address is in {file} (mobilellm data batch {self._directory} "
            "shows its text); the checkpoints before it are kept: look at the data, or train in a fresh "
            f"folder with an optim.lr below {lr:g}"
        )
