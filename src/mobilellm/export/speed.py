"""How fast an artefact runs here, and in how much memory: its own runtime in a process of its own.

    python -m mobilellm.export.speed MODULE OPENER PATH CONTEXT ROUNDS BEGIN

is that process: OPENER of MODULE opens the artefact, and BEGIN is the moment (time.monotonic) when it was
asked for. It prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mobilellm.bench.cold_start import peak_bytes

if TYPE_CHECKING:
    from mobilellm.export.targets import Opener

_PROMPT, _STEPS = 8, 64


class Speed(NamedTuple):
    runtime: str
    first_token_seconds: float
    """From the start of the process, imports and loading included."""
    tokens_per_second: float
    """One at a time; the median of the rounds."""
    peak_bytes: int
    """Most memory of the process, or of the one in which its runtime lives."""


def measure(opener: Opener, path: Path, context: int, rounds: int = 3) -> Speed:
    """Raises ValueError with the last line of what went wrong."""
    arguments = [opener.__module__, getattr(opener, "__name__", ""), str(path), str(context), str(rounds)]
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments, str(time.monotonic())],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(f"{path}: could not be measured ({said[-1] if said else 'it ended without a word'})")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    module, name, path, context, rounds, begin = sys.argv[1:]
    opener: Opener = getattr(import_module(module), name)
    with opener(Path(path)) as runtime:
        tokens = [1, *range(10, 9 + min(_STEPS, int(context)))]
        runtime.greedy(tokens[:_PROMPT], 1)
        first = time.monotonic() - float(begin)
        rates = []
        for _ in range(int(rounds)):
            start = time.perf_counter()
            runtime.steps(tokens)
            rates.append(len(tokens) / (time.perf_counter() - start))
        name = runtime.name
    print(json.dumps(Speed(name, first, statistics.median(rates), _peak_bytes())._asdict()))


def _peak_bytes() -> int:
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(peak_bytes(), children if sys.platform == "darwin" else children * 1024)


if __name__ == "__main__":
    main()
