"""The engine's instruction sets against each other, on one processor and one model after the other.

    python benchmarks/instruction_sets.py 125m:Q8_0 125m:Q4_0 --json docs/results/instruction-sets.json

All that the processor has but the portable, in turns: tokens a second of a prompt fed at once, of decoding
from the start, and after a long text with keys and values in 8 bits. Medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import machine
from model_files import gguf_file

from mobilellm.gguf import GGUF, read_gguf
from mobilellm.runtime.bench import EngineContestant
from mobilellm.runtime.engine import NativeModel, instruction_sets, missing

PROMPT, NEW, DEPTH = 512, 32, 1900


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="SHAPE:TYPE, or a .gguf file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (fault := missing()) is not None:
        raise SystemExit(f"the native engine was not compiled: {fault}")
    measured = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            file = read_gguf(gguf_file(name, folder))
            measured[name] = _in_turns(file, arguments.threads, arguments.rounds)
    machine.write(arguments.json, {"threads": arguments.threads, "tokens_per_second": measured})


def _in_turns(file: GGUF, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens/s of each kind of work by each set of instructions."""
    work: dict[tuple[str, str], Callable[[], float]] = {}
    for isa in instruction_sets():
        if isa == "scalar":
            continue
        plain, bytes_ = (
            EngineContestant(NativeModel(file, threads, isa, cache), DEPTH + NEW, 0)
            for cache in ("f16", "q8_0")
        )
        work[f"prefill of {PROMPT}", isa] = lambda one=plain: PROMPT / one.prefill(PROMPT)
        work["decoding from the start", isa] = lambda one=plain: NEW / one.decode(0, NEW)
        work[f"decoding after {DEPTH}, cache in q8_0", isa] = lambda one=bytes_: NEW / one.decode(DEPTH, NEW)
    samples = [[one() for one in work.values()] for _ in range(1 + rounds)][1:]
    found: dict[str, dict[str, float]] = {}
    for (what, isa), values in zip(work, zip(*samples, strict=True), strict=True):
        found.setdefault(what, {})[isa] = round(statistics.median(values), 1)
    return found


if __name__ == "__main__":
    main()
