"""How far a scoring is: a live bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from mobilellm.eval.harness import Progress as Done

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_RATE = 30.0


class ScoringProgress:
    """Feed it what the harness reports; everything goes to stderr.

    The rate is that of the last half minute, in tokens as the tasks have them: a model that runs a shared
    context once is the faster for it, and answers from the cache count while they come.
    """

    def __init__(self, name: str) -> None:
        self._name, self._live = name, sys.stderr.isatty()
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(file=sys.stderr),
            disable=not self._live,
        )
        self._task = self._bar.add_task(name, total=None, text="preparing")
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: Done) -> None:
        if done.seconds - self._recent[-1][0] >= 0.5:
            self._recent.append((done.seconds, done.tokens))
            while done.seconds - self._recent[1][0] > _SECONDS_OF_RATE:
                self._recent.popleft()
        if self._live:
            self._bar.update(self._task, total=done.all_tokens, completed=done.tokens, text=self._text(done))
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            share = 100 * done.tokens / done.all_tokens
            print(f"{self._name}: {share:.1f} %  {self._text(done)}", file=sys.stderr, flush=True)

    def _text(self, done: Done) -> str:
        seconds, tokens = self._recent[0]
        rate = (done.tokens - tokens) / max(done.seconds - seconds, 1e-9)
        left = (done.all_tokens - done.tokens) / max(rate, 1e-9)
        done_of_all = f"{done.requests:,} of {done.all_requests:,} requests"
        return f"{done_of_all}  {rate:,.0f} tokens/s  {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes = int(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
