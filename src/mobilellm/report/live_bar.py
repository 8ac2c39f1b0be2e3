"""A bar on a terminal's standard error that shows how far work is; elsewhere it shows nothing."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_REMEMBERED = 3600
"""Seconds of work that the time left follows from, at most its last thousand parts: of parts that take longer
than half of this no speed would be known."""


class LiveBar:
    """Shown while it is open, with a text and the time left beside it."""

    def __init__(
        self, total: float | None = None, completed: int = 0, indent: str = "", transient: bool = False
    ) -> None:
        """`transient`: nothing of it stays when it is closed."""
        self.is_live = sys.stderr.isatty()
        self._bar = Progress(
            *([TextColumn(indent)] if indent else []),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            speed_estimate_period=_REMEMBERED,
            console=Console(file=sys.stderr),
            disable=not self.is_live,
            transient=transient,
        )
        self._task = self._bar.add_task("", total=total, completed=completed, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, completed: float, text: str, total: float | None = None) -> None:
        """`total`: as it is now, where it was not known before."""
        self._bar.update(self._task, completed=completed, text=text, total=total)
