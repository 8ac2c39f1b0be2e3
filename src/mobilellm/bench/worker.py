"""A contestant in a process of its own: its memory and its threads are nobody else's.

    python -m mobilellm.bench.worker KIND SOURCE THREADS ROOM

reads calls, one JSON object a line ({"call": "decode", "depth": 512, "tokens": 32}), and answers each with a
line ({"answer": 0.27}, or {"error": "…"}). It ends with its input, and sleeps while others are measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mobilellm.bench.contestant import maker


class WorkerError(ValueError):
    """A contestant could not be made or could not do what it was asked; one line says why."""


class Worker:
    """The side of who asks. Closed, it ends the process."""

    def __init__(self, kind: str, source: Path, threads: int, room: int) -> None:
        """Raises WorkerError with one line where the contestant cannot be made."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, kind, str(source), str(threads), str(room)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            start_new_session=True,  # Ctrl-C comes to who asks, who ends this process
            env=contestants_environment(),
        )  # fmt: skip
        try:
            self.about: dict[str, Any] = self.call("about")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, name: str, **arguments: int) -> Any:
        """What the contestant's method returns. Raises WorkerError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return f"the process ended with code {code}: {last}"


def contestants_environment() -> dict[str, str]:
    """As of a process that nobody has prepared: GOMP_SPINCOUNT is this package's choice for its training."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {
        "HF_HUB_OFFLINE": "1"
    }


def main() -> None:
    kind, source, threads, room = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    contestant = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            contestant = contestant or maker(kind)(source, int(threads), int(room))
            answer = {"answer": getattr(contestant, asked.pop("call"))(**asked)}
        except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
