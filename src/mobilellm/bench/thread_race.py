"""Numbers of threads in turns: one process with one model, which decodes and reads a prompt on each."""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mobilellm.bench.contestant import RUNTIME
from mobilellm.bench.entries import Entry
from mobilellm.bench.race import REST, Progress, Timing
from mobilellm.bench.worker import Worker, WorkerError
from mobilellm.runtime.thread_choice import fewest_of_the_best


@dataclass(frozen=True)
class ThreadTimings:
    """One model, by numbers of threads."""

    entry: Entry
    decode: Mapping[int, Timing]
    prefill: Mapping[int, Timing]

    @property
    def best_decode(self) -> int:
        """The fewest within the runtime's margin of the fastest, as it chooses by itself."""
        return _best(self.decode)

    @property
    def best_prefill(self) -> int:
        return _best(self.prefill)


class Turn(NamedTuple):
    """Seconds to decode and to read the prompt; bytes a second that so many threads read of memory."""

    decode: float
    prefill: float
    memory: float


def race_threads(
    entries: Sequence[Entry],
    counts: Sequence[int],
    tokens: int,
    prompt: int,
    rounds: int,
    progress: Progress,
) -> list[ThreadTimings]:
    """`tokens` one by one into an empty sequence, and a prompt of `prompt` at once, on each of `counts`.

    In a round each number has its turn; nothing is counted of the first round. Raises ValueError for what is
    no .gguf file, or cannot be run.
    """
    done, total = itertools.count(1), len(entries) * (rounds + 1) * len(counts)
    found = []
    for entry in entries:
        if entry.kind not in RUNTIME.values():
            raise ValueError(f"{entry.model}: threads are measured of .gguf files alone")
        try:
            with Worker(entry.kind, entry.source, max(counts), max(tokens, prompt)) as worker:
                turns: dict[int, list[Turn]] = {count: [] for count in counts}
                for _, count in itertools.product(range(rounds + 1), counts):
                    turns[count].append(_turn(worker, count, tokens, prompt))
                    progress(next(done), total, f"{entry.model}, {entry.label}, on {count}")
                about = entry.described | worker.about
        except WorkerError as error:
            raise ValueError(f"{entry.model}: {error}") from None
        found.append(
            _timings(entry, about, {count: each[1:] for count, each in turns.items()}, tokens, prompt)
        )
    return found


def _turn(worker: Worker, threads: int, tokens: int, prompt: int) -> Turn:
    time.sleep(REST)
    worker.call("use_threads", threads=threads)
    memory = worker.call("read_memory")
    return Turn(worker.call("decode", depth=0, tokens=tokens), worker.call("prefill", tokens=prompt), memory)


def _timings(
    entry: Entry, about: dict[str, Any], turns: Mapping[int, Sequence[Turn]], tokens: int, prompt: int
) -> ThreadTimings:
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    decode, prefill = {}, {}
    for count, its_turns in turns.items():
        decoding, reading, memory = zip(*its_turns, strict=True)
        its_about = about | {"n_threads": count}
        decode[count] = Timing(entry, its_about, 0, tokens, 0, decoding, memory, when)
        prefill[count] = Timing(entry, its_about, prompt, 0, 0, reading, memory, when)
    return ThreadTimings(entry, decode, prefill)


def _best(timings: Mapping[int, Timing]) -> int:
    return fewest_of_the_best({count: statistics.median(each.seconds) for count, each in timings.items()})
