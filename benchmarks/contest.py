"""Contestants in training, each run a fresh process, in turns: the median run of each, and their ratios."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Result = dict[str, Any]


def in_turns(
    shape: str,
    names: Sequence[str],
    runs: int,
    spawn: Callable[[str, bool], Result],
    further: Callable[[Sequence[Result]], Result],
) -> dict[str, Result]:
    """What each contestant reached. `spawn(name, import_only)` is one process, which tells its peak at least.

    Peak memory is a process's own, less that of one which only imported the same packages. `further` makes of
    a contestant's runs what else is to be told of it.
    """
    imported = {name: spawn(name, True)["peak"] for name in names}
    done: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            done[name].append(spawn(name, False))
            print(f"{shape} {name}: {done[name][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    return {
        name: {
            "tokens_per_second": round(median(of, "tokens_per_second"), 1),
            "all_runs": [round(run["tokens_per_second"], 1) for run in of],
            "peak_megabytes": round((median(of, "peak") - imported[name]) / 2**20),
            "peak_megabytes_of_import": round(imported[name] / 2**20),
            **further(of),
        }
        for name, of in done.items()
    }


def median(runs: Iterable[Result], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def ratios(table: dict[str, Result], pairs: Iterable[tuple[str, str]], of: Sequence[str]) -> Result:
    """Ours over theirs."""
    return {
        f"{mine} / {theirs}": {what: round(table[mine][what] / table[theirs][what], 3) for what in of}
        for mine, theirs in pairs
    }


def peak_bytes() -> int:
    """Of this process, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
