"""What `mobilellm bench` shows of its measurements: rows of a table, records, bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobilellm.bench.race import Outcome, Timing, times_faster
from mobilellm.bench.starts import Start
from mobilellm.bench.thread_race import ThreadTimings
from mobilellm.report.speed import Bar, Panel, speed_picture
from mobilellm.runtime.thread_choice import MARGIN


@dataclass(frozen=True)
class Results:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[dict[str, Any]]
    panels: Sequence[Panel]
    notes: Sequence[str]
    best_threads: Sequence[dict[str, Any]] = ()
    """For decoding and for prompts, by model, where that was measured."""

    def picture(self, title: str) -> bytes:
        return speed_picture(self.panels, title)


def of_timings(outcome: Outcome) -> Results:
    """Of decoding or prefill: models in the order they were named, their lengths and runtimes below them."""
    timings = _in_order(outcome.timings)
    ratios = [times_faster(timings, than) for than in timings]
    decoding = bool(timings[0].n_gen)
    header = ["model", "runtime", "tokens", "tokens/s", "±"]
    rows = []
    for timing, ratio in zip(timings, ratios, strict=True):
        row = [
            timing.entry.model,
            timing.entry.label,
            _length(timing),
            f"{timing.tokens_per_second:.1f}",
            f"{timing.deviation:.1f}",
        ]
        if decoding:
            row += [_gigabytes(timing.read_per_second), _percent(timing.share_of_bandwidth)]
        rows.append([*row, "" if ratio is None else f"{ratio:.2f} times"])
    if decoding:
        header += ["GB/s read", "of memory's"]
    bars = [
        Bar(
            f"{timing.entry.model}\n{_length(timing)}",
            timing.entry.runtime,
            timing.tokens_per_second,
            _written(timing, ratio),
        )
        for timing, ratio in zip(timings, ratios, strict=True)
    ]
    what = "Decoding, one token at a time" if decoding else "Prefill, a prompt at once"
    notes = list(outcome.failures)
    if decoding and timings[0].memory:
        read = statistics.median(each for timing in timings for each in timing.memory)
        notes.insert(0, f"Memory was read at {read / 1e9:.1f} GB/s by as many threads, between the turns.")
    records = [
        timing.record() | {"mobilellm_times_faster": None if ratio is None else round(ratio, 3)}
        for timing, ratio in zip(timings, ratios, strict=True)
    ]
    return Results(
        [*header, "mobilellm is faster"], rows, records, [Panel(what, "tokens a second, median", bars)], notes
    )


def of_threads(measured: Sequence[ThreadTimings]) -> Results:
    """Of numbers of threads: a row each, models in the order they were named."""
    header = ["model", "runtime", "threads", "decode, tokens/s", "±", "GB/s read", "of memory's"]
    header += ["prefill, tokens/s", "±"]
    decode_bars: list[Bar] = []
    prefill_bars: list[Bar] = []
    rows, notes = [], []
    for each in measured:
        group = f"{each.entry.model}\n{each.entry.label}"
        for count, decode in each.decode.items():
            prefill = each.prefill[count]
            rows.append(
                [
                    each.entry.model, each.entry.label, str(count), f"{decode.tokens_per_second:.1f}",
                    f"{decode.deviation:.1f}", _gigabytes(decode.read_per_second),
                    _percent(decode.share_of_bandwidth), f"{prefill.tokens_per_second:.1f}",
                    f"{prefill.deviation:.1f}",
                ]
            )  # fmt: skip
            for bars, timing in ((decode_bars, decode), (prefill_bars, prefill)):
                bars.append(Bar(group, _threads(count), timing.tokens_per_second, _written(timing, None)))
        notes.append(
            f"{each.entry.model}, {each.entry.label}: best for decoding {_threads(each.best_decode)}, for "
            f"prompts {_threads(each.best_prefill)}, which are the fewest within {MARGIN:.0%} of the fastest."
        )
    records = [
        timing.record() for each in measured for timing in (*each.decode.values(), *each.prefill.values())
    ]
    best = [
        {"model": each.entry.model, "engine": each.entry.label, "decode": each.best_decode,
         "prefill": each.best_prefill} for each in measured
    ]  # fmt: skip
    notes.append("Without --threads, the runtime finds out for itself while it decodes.")
    unit = "tokens a second, median"
    panels = [
        Panel("Decoding, one token at a time", unit, decode_bars),
        Panel("A prompt at once", unit, prefill_bars),
    ]
    return Results(header, rows, records, panels, notes, best)


def of_starts(starts: Sequence[Start], failures: Sequence[str]) -> Results:
    header = [
        "model",
        "runtime",
        "loading",
        "first token",
        "peak memory",
        "of it Python",
        "file",
        "cache",
        "the rest",
    ]
    rows = []
    for start in starts:
        python, peak = start.peak_bytes[0], start.peak_bytes[-1]
        cache = start.cache_bytes
        rest = None if cache is None else peak - python - start.file_bytes - cache
        times = [f"{seconds:.3f} s" for seconds in (start.load_seconds, start.first_token_seconds)]
        sizes = map(_megabytes, (peak, python, start.file_bytes, cache, rest))
        rows.append([start.entry.model, start.entry.label, *times, *sizes])
    seconds = [
        Bar(
            start.entry.model,
            start.entry.runtime,
            start.first_token_seconds,
            f"{start.first_token_seconds:.2f} s",
        )
        for start in starts
    ]
    memory = [
        Bar(
            start.entry.model,
            start.entry.runtime,
            start.peak_bytes[-1] / 1e6,
            _megabytes(start.peak_bytes[-1]),
        )
        for start in starts
    ]
    context = starts[0].context if starts else 0
    panels = [
        Panel("From the start of a process to the first token", "seconds, median", seconds),
        Panel(f"Most memory, a sequence of {context:,} tokens", "MB", memory),
    ]
    notes = [
        f"Peak memory: of a sequence of {context:,} tokens; its cache is as large as its type makes it. "
        "Of it Python: after the imports, before there is a model.",
        *failures,
    ]
    return Results(header, rows, [start.record() for start in starts], panels, notes)


def _in_order(timings: Sequence[Timing]) -> list[Timing]:
    models = list(dict.fromkeys(timing.entry.model for timing in timings))
    return sorted(timings, key=lambda timing: models.index(timing.entry.model))  # stable


def _length(timing: Timing) -> str:
    return f"{timing.n_gen} after {timing.n_depth:,}" if timing.n_gen else f"{timing.n_prompt:,} at once"


def _written(timing: Timing, ratio: float | None) -> str:
    """At the end of a bar."""
    parts = [f"{timing.tokens_per_second:,.0f}"]
    if (share := timing.share_of_bandwidth) is not None:
        parts.append(f"{share:.0%} of bandwidth")
    if timing.entry.remark:
        parts.append(timing.entry.remark)
    if ratio is not None:
        parts.append(f"mobilellm {ratio:.2f} times")
    return ", ".join(parts)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f} MB"
