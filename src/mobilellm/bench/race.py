"""Contestants in turns: in a round each is measured once, so that what else the machine does falls on all.

Between two turns the engine's threads read memory that no cache holds: the bandwidth beside each number is
that of the same round. Nothing is counted of the first round, in which all warm up.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mobilellm.bench.contestant import RUNTIME
from mobilellm.bench.entries import Entry
from mobilellm.bench.worker import Worker, WorkerError

REST = 0.03
"""Seconds between two turns: threads that still wait for work go to sleep."""

Progress = Callable[[int, int, str], None]
"""(turns done, turns in all, whose turn it is)"""


@dataclass(frozen=True)
class Timing:
    """One contestant at one length: a prompt of `n_prompt` at once, or `n_gen` one by one after `n_depth`."""

    entry: Entry
    about: dict[str, Any]
    n_prompt: int
    n_gen: int
    n_depth: int
    seconds: tuple[float, ...]
    """Of every round."""
    memory: tuple[float, ...]
    """Bytes a second read in every round; none where nothing native took part."""
    when: str
    """The end of it: date and time, UTC."""

    @property
    def length(self) -> tuple[int, int, int]:
        return self.n_prompt, self.n_gen, self.n_depth

    @property
    def tokens_per_second(self) -> float:
        """The median round's."""
        return (self.n_prompt + self.n_gen) / statistics.median(self.seconds)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of every round."""
        return [(self.n_prompt + self.n_gen) / seconds for seconds in self.seconds]

    @property
    def deviation(self) -> float:
        """Standard deviation of the rounds, in tokens a second; 0 for one round."""
        return _deviation(self.rates)

    @property
    def read_per_second(self) -> float | None:
        """Bytes a second that decoding read, weights and cache; None of a prompt, which they do not bind."""
        if not self.n_gen:
            return None
        cached = self.about["cache_bytes_per_token"] * (self.n_depth + self.n_gen / 2)
        return float(self.about["bytes_per_token"] + cached) * self.tokens_per_second

    @property
    def share_of_bandwidth(self) -> float | None:
        read = self.read_per_second
        return read / statistics.median(self.memory) if read is not None and self.memory else None

    def record(self) -> dict[str, Any]:
        """Under llama-bench's names, and below them our own."""
        return {
            "model_filename": self.entry.source.name,
            **self.about,
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "n_depth": self.n_depth,
            "test_time": self.when,
            "avg_ns": round(statistics.mean(self.seconds) * 1e9),
            "stddev_ns": round(_deviation(self.seconds) * 1e9),
            "avg_ts": round(statistics.mean(self.rates), 3),
            "stddev_ts": round(self.deviation, 3),
            "samples_ns": [round(seconds * 1e9) for seconds in self.seconds],
            "model": self.entry.model,
            "engine": self.entry.label,
            "median_ts": round(self.tokens_per_second, 3),
            "best_ts": round(max(self.rates), 3),
            "read_gb_per_second": _billions(self.read_per_second),
            "memory_gb_per_second": _billions(statistics.median(self.memory) if self.memory else None),
            "share_of_bandwidth": None if (share := self.share_of_bandwidth) is None else round(share, 4),
        }


@dataclass(frozen=True)
class Outcome:
    timings: list[Timing]
    failures: list[str]
    """Contestants that could not take part, and why; one line each."""


def race_decode(
    entries: Sequence[Entry],
    depths: Sequence[int],
    tokens: int,
    rounds: int,
    threads: int,
    progress: Progress,
) -> Outcome:
    """`tokens` one by one after each of `depths`. Raises ValueError where one of ours cannot run."""
    lengths = [(0, tokens, depth) for depth in sorted(depths)]
    return _race(entries, lengths, rounds, threads, progress)


def race_prefill(
    entries: Sequence[Entry], prompts: Sequence[int], rounds: int, threads: int, progress: Progress
) -> Outcome:
    """Each of `prompts` at once. Raises as `race_decode`."""
    return _race(entries, [(prompt, 0, 0) for prompt in sorted(prompts)], rounds, threads, progress)


def times_faster(timings: Sequence[Timing], than: Timing) -> float | None:
    """This package's rate over another runtime's at the same length, of the same model if that was measured.

    Else of the first model: an artefact for another runtime stands by itself. None for one of our own.
    """
    ours = [timing for timing in timings if timing.entry.is_ours and timing.length == than.length]
    same = [timing for timing in ours if timing.entry.model == than.entry.model]
    if than.entry.is_ours or not ours:
        return None
    return (same or ours)[0].tokens_per_second / than.tokens_per_second


def _race(
    entries: Sequence[Entry],
    lengths: Sequence[tuple[int, int, int]],
    rounds: int,
    threads: int,
    progress: Progress,
) -> Outcome:
    room = max(map(sum, lengths))
    timings: list[Timing] = []
    with ExitStack() as stack:
        workers, failures = _started(entries, threads, room, stack)
        reader = next((worker for entry, worker in workers if entry.kind in RUNTIME.values()), None)
        turns, total = itertools.count(1), len(lengths) * (rounds + 1) * len(workers)
        for n_prompt, n_gen, n_depth in lengths:
            seconds: list[list[float]] = [[] for _ in workers]
            memory = []
            for _ in range(rounds + 1):
                if reader is not None:
                    memory.append(reader.call("read_memory"))
                for own, (entry, worker) in zip(seconds, workers, strict=True):
                    time.sleep(REST)
                    if n_gen:
                        own.append(worker.call("decode", depth=n_depth, tokens=n_gen))
                    else:
                        own.append(worker.call("prefill", tokens=n_prompt))
                    progress(next(turns), total, f"{entry.model}, {entry.label}, {n_prompt or n_depth}")
            when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            timings += [
                Timing(
                    entry, entry.described | worker.about, n_prompt, n_gen, n_depth, tuple(own[1:]),
                    tuple(memory[1:]), when,
                )
                for own, (entry, worker) in zip(seconds, workers, strict=True)
            ]  # fmt: skip
    return Outcome(timings, failures)


def _started(
    entries: Sequence[Entry], threads: int, room: int, stack: ExitStack
) -> tuple[list[tuple[Entry, Worker]], list[str]]:
    workers, failures = [], []
    for entry in entries:
        try:
            workers.append((entry, stack.enter_context(Worker(entry.kind, entry.source, threads, room))))
        except WorkerError as error:
            if entry.is_ours:
                raise ValueError(f"{entry.model}: {error}") from None
            failures.append(f"{entry.label} could not run {entry.model}: {error}")
    return workers, failures


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _billions(value: float | None) -> float | None:
    return None if value is None else round(value / 1e9, 3)
