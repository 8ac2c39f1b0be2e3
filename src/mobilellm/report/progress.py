"""Progress of a training run: a live bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

from mobilellm.report.durations import duration
from mobilellm.report.live_bar import LiveBar

_SECONDS_BETWEEN_LINES = 60


class TrainingProgress(LiveBar):
    """Feed it the loop's records. Shows step, loss (mean of the last ten), tokens/s, MFU and time left.

    In a pipe a line is printed every tenth of the run, and every minute of a long one.

    MFU counts `flops_per_token` (6N and causal attention) against `peak_flops` of all devices together.
    """

    def __init__(
        self, steps: int, done: int, flops_per_token: float = 0, peak_flops: float | None = None
    ) -> None:
        super().__init__(total=steps, completed=done, indent="      ")
        self._utilisation = flops_per_token / peak_flops if peak_flops else 0.0  # MFU per token/s
        self._steps, self._losses = steps, list[float]()
        self._seconds = self._tokens = 0.0
        self._last_tokens: int | None = None
        self._lines_at, self._last_line = max(1, steps // 10), time.monotonic()

    def update(self, record: Mapping[str, Any]) -> None:
        if "loss" not in record:
            return
        step = int(record["step"])
        tokens = record["tokens"] - (self._last_tokens or record["tokens"] * (step - 1) // step)
        self._last_tokens = record["tokens"]
        # A running rate that forgets: the machine may be busy for a while.
        self._seconds, self._tokens = 0.9 * self._seconds + record["seconds"], 0.9 * self._tokens + tokens
        self._losses = [*self._losses[-9:], record["loss"]]
        rate = self._tokens / max(self._seconds, 1e-9)
        text = (
            f"step {step}/{self._steps}  loss {sum(self._losses) / len(self._losses):.3f}  "
            f"{rate:,.0f} tokens/s"
        )
        if self._utilisation:
            text += f"  {rate * self._utilisation:.0%} MFU"
        self.show(step, text, self._steps)
        now = time.monotonic()
        due = step % self._lines_at == 0 or now - self._last_line > _SECONDS_BETWEEN_LINES
        if not self.is_live and (due or step == self._steps):
            self._last_line = now
            left = (self._steps - step) * self._seconds / max(self._tokens, 1) * tokens
            print(f"      {text}" + (f"  {duration(left)} left" if left >= 1 else ""), flush=True)


def say_stopping() -> None:
    """For a signal's handler: written past Python's streams, on which something may just be being printed."""
    with contextlib.suppress(OSError):
        os.write(2, b"\n      stopping after this step, then saving (Ctrl-C again stops at once) ...\n")
