"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests(on_stop: Callable[[], None] | None = None) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 as requests to stop after this step; a Ctrl-C after one interrupts.

    A scheduler's SIGTERM may come twice, from itself and passed on by the launcher. A signal that the process
    was started to ignore (a job in the background, nohup) stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in wanted}
    # None stands for a handler that was not set from Python and cannot be put back.
    previous = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        if on_stop is not None and len(received) == 1:
            on_stop()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    except Exception:
        # Native code turns an interrupt into an error of its own, e.g. of damaged data.
        if signal.SIGINT in received[1:]:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ended_on_request(code: int) -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the process with `code`, where there is nothing yet to finish and to save.

    `stop_requests` within takes their place meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(code)

    wanted = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    previous = {number: old for number, old in wanted.items() if old not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
