"""How long from nothing to the first token, and how much memory: new processes, the contestants in turns."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobilellm.bench.cold_start import STEPS
from mobilellm.bench.entries import Entry
from mobilellm.bench.race import Progress
from mobilellm.bench.worker import contestants_environment


@dataclass(frozen=True)
class Start:
    """Of one contestant with one model: seconds and most memory after each of cold_start's STEPS."""

    entry: Entry
    context: int
    seconds: tuple[tuple[float, ...], ...]
    """Of every start."""
    peak_bytes: tuple[int, ...]
    """The most of all starts."""

    @property
    def load_seconds(self) -> float:
        """Of the loading alone."""
        return statistics.median(start[1] - start[0] for start in self.seconds)

    @property
    def first_token_seconds(self) -> float:
        """From the start of the process."""
        return statistics.median(start[2] for start in self.seconds)

    @property
    def file_bytes(self) -> int:
        source = self.entry.source
        patterns = ("*.safetensors", "*.pte", "*.onnx*")
        files = [source] if source.is_file() else [each for one in patterns for each in source.rglob(one)]
        return sum(file.stat().st_size for file in files)

    @property
    def cache_bytes(self) -> int | None:
        """Keys and values of the whole sequence; None where only the runtime could tell."""
        each = self.entry.described.get("cache_bytes_per_token")
        return None if each is None else each * self.context

    def record(self) -> dict[str, Any]:
        described = self.entry.described
        middle = [statistics.median(start[step] for start in self.seconds) for step in range(len(STEPS))]
        return {
            "model_filename": self.entry.source.name,
            **{
                key: described[key]
                for key in ("model_type", "model_size", "model_n_params")
                if key in described
            },
            "model": self.entry.model,
            "engine": self.entry.label,
            "n_ctx": self.context,
            "load_seconds": round(self.load_seconds, 4),
            **{f"{name}_at_seconds": round(at, 4) for name, at in zip(STEPS, middle, strict=True)},
            **{f"{name}_peak_bytes": peak for name, peak in zip(STEPS, self.peak_bytes, strict=True)},
            "file_bytes": self.file_bytes,
            "cache_bytes": self.cache_bytes,
        }


def cold_starts(
    entries: Sequence[Entry], context: int, rounds: int, threads: int, progress: Progress
) -> tuple[list[Start], list[str]]:
    """Starts of every contestant, and one line for each that could not start.

    The first round is not counted: it reads files that are not in memory yet. Raises ValueError where this
    package's own cannot be run.
    """
    said: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in entries}
    failures = []
    for number in range(rounds + 1):
        for turn, entry in enumerate(entries):
            if entry in said:
                try:
                    said[entry].append(_start(entry, threads, context))
                except ValueError as error:
                    if entry.is_ours:
                        raise ValueError(f"{entry.model}: {error}") from None
                    failures.append(f"{entry.label} could not start with {entry.model}: {error}")
                    del said[entry]
            progress(
                number * len(entries) + turn + 1, (rounds + 1) * len(entries), f"{entry.model}, {entry.label}"
            )
    starts = []
    for entry, each in said.items():
        counted = each[1:]
        peaks = tuple(max(step) for step in zip(*(start["peak_bytes"] for start in counted), strict=True))
        starts.append(Start(entry, context, tuple(tuple(start["seconds"]) for start in counted), peaks))
    return starts, failures


def _start(entry: Entry, threads: int, context: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "mobilellm.bench.cold_start", entry.kind, str(entry.source)]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, str(threads), str(context), repr(begin)],
        capture_output=True, text=True, check=False, env=contestants_environment(),
    )  # fmt: skip
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said
