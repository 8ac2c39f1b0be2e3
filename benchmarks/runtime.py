"""Speed of the native engine: decoding, prefill, loading, memory, beside this machine's own read bandwidth.

    python benchmarks/runtime.py --peers --json runtime.json

What `mobilellm bench decode`, `prefill` and `load` measure, of random weights of the presets' shapes, in one
run and one file; all models and runtimes take turns. `--peers` wants the extra `peers`
and takes several times as long; `--peers llama.cpp` takes that one alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

from mobilellm.bench.contestant import PEERS
from mobilellm.bench.entries import entries
from mobilellm.bench.race import Timing, race_decode, race_prefill, times_faster
from mobilellm.bench.starts import Start, cold_starts
from mobilellm.runtime.cores import default_threads

DECODED, DEPTHS, PREFILLED, CONTEXT = 32, (0, 512, 1900), 512, 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["125m:Q8_0", "125m:Q4_0", "ls-125m:Q8_0", "ls-125m:Q4_0"]
    )
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="these, or without names all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads, rounds = arguments.threads, arguments.rounds
    peers = () if arguments.peers is None else arguments.peers or PEERS
    with tempfile.TemporaryDirectory() as folder:
        taking_part = entries(arguments.models, peers, Path(folder), _say)
        decoding = race_decode(taking_part, arguments.depths, DECODED, rounds, threads, _progress)
        prefill = race_prefill(taking_part, [PREFILLED], rounds, threads, _progress)
        starts, failures = cold_starts(taking_part, CONTEXT, rounds, threads, _progress)
        timings = decoding.timings + prefill.timings
        models: dict[str, Any] = {name: {} for name in arguments.models}
        for timing in timings:
            runtime = models[timing.entry.model].setdefault(timing.entry.label, {})
            runtime |= dict(_numbers(timing, times_faster(timings, timing)))
        for start in starts:
            models[start.entry.model][start.entry.label] |= _start(start)
    machine.write(
        arguments.json,
        {
            "threads": threads,
            "rounds": rounds,
            "tokens": {"decoded": DECODED, "prefilled": PREFILLED, "context": CONTEXT},
            "models": models,
            "failures": [*decoding.failures, *prefill.failures, *failures],
        },
    )


def _numbers(timing: Timing, ratio: float | None) -> Iterator[tuple[str, Any]]:
    if timing.n_prompt:
        name, more = "prefill", {}
    else:
        name = f"decode_after_{timing.n_depth}"
        more = {
            "read_gb_per_second": round((timing.read_per_second or 0) / 1e9, 1),
            "memory_gb_per_second": round(statistics.median(timing.memory) / 1e9, 1),
            "share_of_bandwidth": round(timing.share_of_bandwidth or 0, 3),
        }
    yield "version", f"{timing.about['version']} ({timing.about['backends']})"
    yield (
        name,
        {
            "tokens_per_second": round(timing.tokens_per_second, 1),
            "best": round(max(timing.rates), 1),
            "deviation": round(timing.deviation, 1),
            **more,
            **({} if ratio is None else {"mobilellm_times_faster": round(ratio, 2)}),
        },
    )


def _start(start: Start) -> dict[str, Any]:
    """Peak memory is that of a full context."""
    return {
        "load_seconds": round(start.load_seconds, 3),
        "first_token_seconds": round(start.first_token_seconds, 3),
        "peak_megabytes": round(start.peak_bytes[-1] / 1e6, 1),
        "of_these_python": round(start.peak_bytes[0] / 1e6, 1),
        "file_megabytes": round(start.file_bytes / 1e6, 1),
        "cache_of_full_context_megabytes": round((start.cache_bytes or 0) / 1e6, 1),
    }


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _progress(done: int, total: int, whose: str) -> None:
    if done % 50 == 0:
        _say(f"{done} of {total}: {whose}")


if __name__ == "__main__":
    main()
