"""How fast an artefact runs here, and in how much memory: its own runtime in a process of its own.

    python -m mobilellm.export.speed MODULE OPENER PATH CONTEXT BEGIN

is that process: OPENER of MODULE opens the artefact, and BEGIN is the moment (time.monotonic) when it was
asked for. It prints one JSON object.

A small model writes 64 tokens in hundredths of a second. By three such measurements in one process two copies
of a file came out up to a third apart; so each process measures for longer, and there are several, in turns.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mobilellm.bench.cold_start import peak_bytes

if TYPE_CHECKING:
    from mobilellm.export.targets import Opener

_PROMPT, _STEPS = 8, 64
_SECONDS, _FEWEST = 0.3, 2
"""How long a process measures decoding, and how often at least; once before that it warms up."""


class Speed(NamedTuple):
    runtime: str
    first_token_seconds: float
    """From the start of the process, imports and loading included."""
    tokens_per_second: float
    """One at a time; the median."""
    peak_bytes: int
    """Most memory of the process, or of the one in which its runtime lives."""


def measure_in_turns(
    artefacts: Mapping[Path, tuple[Opener, int]], rounds: int, failed: Callable[[Path, ValueError], None]
) -> dict[Path, Speed]:
    """Of every artefact, given with what opens it and its context, the medians of `rounds` processes.

    In a round each is measured once, so that what else the machine does falls on all. One that cannot be
    measured is told to `failed` and left out.
    """
    found: dict[Path, list[Speed]] = {path: [] for path in artefacts}
    for _ in range(rounds):
        for path in list(found):
            try:
                found[path].append(measure(*artefacts[path], path))
            except ValueError as error:
                del found[path]
                failed(path, error)
    return {path: _median(speeds) for path, speeds in found.items()}


def _median(speeds: Sequence[Speed]) -> Speed:
    seconds, rates, peaks = zip(*(each[1:] for each in speeds), strict=True)
    return Speed(
        speeds[0].runtime,
        statistics.median(seconds),
        statistics.median(rates),
        round(statistics.median(peaks)),
    )


def measure(opener: Opener, context: int, path: Path) -> Speed:
    """In one process. Raises ValueError with the last line of what went wrong."""
    arguments = [opener.__module__, getattr(opener, "__name__", ""), str(path), str(context)]
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
    module, name, path, context, begin = sys.argv[1:]
    opener: Opener = getattr(import_module(module), name)
    with opener(Path(path)) as runtime:
        tokens = [1, *range(10, 9 + min(_STEPS, int(context)))]
        runtime.greedy(tokens[:_PROMPT], 1)
        first = time.monotonic() - float(begin)
        runtime.steps(tokens)
        rates: list[float] = []
        started = now = time.perf_counter()
        while now - started < _SECONDS or len(rates) < _FEWEST:
            runtime.steps(tokens)
            before, now = now, time.perf_counter()
            rates.append(len(tokens) / (now - before))
        name = runtime.name
    print(json.dumps(Speed(name, first, statistics.median(rates), _peak_bytes())._asdict()))


def _peak_bytes() -> int:
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(peak_bytes(), children if sys.platform == "darwin" else children * 1024)


if __name__ == "__main__":
    main()
