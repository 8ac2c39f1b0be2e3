"""How far a preparation is: a live bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from mobilellm.report.live_bar import LiveBar

if TYPE_CHECKING:
    from mobilellm.data.prepare import Progress as Done

_SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress(LiveBar):
    """Feed it what `prepare` reports. Everything goes to stderr; `quiet` leaves the lines out."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        self._quiet, self._began = quiet, False
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def update(self, done: Done) -> None:
        if not self._began:
            self._began = True
            if done.documents and not self._quiet:
                print(f"going on after {done.documents:,} documents", file=sys.stderr, flush=True)
        if self.is_live:
            self.show(done.read, _text(done), done.size)
        elif not self._quiet and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            share = f"{100 * done.read / done.size:5.1f} %  " if done.size else ""
            print(f"{share}{_text(done)}", file=sys.stderr, flush=True)


def _text(done: Done) -> str:
    rate = done.session_bytes / 1e6 / max(done.seconds, 1e-9)
    rejected = f"  {done.rejected:,} rejected" if done.rejected else ""
    return f"{done.documents:,} documents  {done.tokens:,} tokens  {rate:.1f} MB/s{rejected}"
