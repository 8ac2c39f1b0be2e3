"""A program in a terminal of its own: what it shows is waited for, what a person would type is typed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


class Terminal:
    """100 columns. Ends the program at the latest when it is left."""

    def __init__(self, command: Sequence[str], home: Path, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=home,
            env=kept | {"XDG_STATE_HOME": str(home / "state"), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self._read_to = 0

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What was shown since the last wait, up to and with `text`."""
        end = time.monotonic() + seconds
        while (place := self.shown.find(text, self._read_to)) < 0:
            if time.monotonic() > end or not self._more():
                raise AssertionError(f"waited for {text!r} in:\n{self.shown[self._read_to :]!r}")
        start, self._read_to = self._read_to, place + len(text)
        return self.shown[start : self._read_to]

    def type_until(self, keys: str, text: str) -> str:
        """Type, again every five seconds, until it is shown: what comes too early may be lost."""
        for _ in range(20):
            self.type(keys)
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, 5)
        return self.wait_for(text, 0)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def exit_code(self) -> int:
        while self._more():
            pass
        return self._process.wait(timeout=120)

    def _more(self) -> bool:
        """Read what is there, for at most a second; False once the program has ended."""
        if not select.select([self._ours], [], [], 1.0)[0]:
            return self._process.poll() is None
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # so Linux tells that the other end is closed
            return False
        self.shown += data.decode("utf-8", errors="replace")
        return data != b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)


def python(*lines: str) -> list[str]:
    """The command that runs these lines, with the tests' own modules at hand."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    first = (
        f"import sys; sys.path[:0] = {paths!r}",
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)",  # so that Ctrl-C comes to it
    )
    return [sys.executable, "-c", "\n".join((*first, *lines))]
