"""How fast models run on this machine, how much memory they take, and what other runtimes make of them.

MODEL is a .gguf file, a model directory (run by PyTorch), or SHAPE:TYPE for random weights, e.g. 125m:Q8_0.
All that is measured takes turns in one run, every contestant in a process of its own, so that ratios hold on
a machine that does other things too. With --peers, llama.cpp and transformers run the same weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mobilellm.atomic import atomic_write
from mobilellm.bench.contestant import KINDS, PEERS
from mobilellm.bench.entries import Entry, entries
from mobilellm.bench.race import Progress, race_decode, race_prefill
from mobilellm.bench.starts import cold_starts
from mobilellm.cli.bench_output import Results, of_starts, of_timings
from mobilellm.cli.tables import print_notes, print_table
from mobilellm.environment import environment
from mobilellm.installation import install_command, missing_packages
from mobilellm.report.live_bar import LiveBar
from mobilellm.runtime.cores import default_threads
from mobilellm.runtime.engine import MOST_THREADS
from mobilellm.runtime.kv_cache import KVCacheType

_PACKAGES = ("mobilellm", "numpy", "torch", "transformers", "llama-cpp-python")
_DEPTHS, _PROMPTS = (0, 512, 1024, 1900), (128, 512)

Models = Annotated[
    tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(name="models", metavar="MODEL [MODEL ...]")
]


@dataclass(frozen=True)
class Options:
    rounds: int = 5
    """How often each is measured; the median counts. One round more, the first, warms up."""
    threads: int | None = None
    """Of every runtime; by default one a fast core, four at most."""
    kv_cache: tuple[KVCacheType, ...] = ("f16",)
    """In which type .gguf files keep keys and values; f16 q8_0 measures both."""
    peers: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure llama.cpp and transformers on the same weights; one that is not installed is named."""
    json: Path | None = None
    """Write all numbers here, under llama-bench's names; - prints them instead of the table."""
    png: Path | None = None
    """Draw bars into this file."""


@dataclass(frozen=True)
class Decode:
    """Tokens a second, one token at a time, after so many others; and the share of the memory's bandwidth."""

    models: Models
    depths: tuple[int, ...] | None = None
    """Tokens already in the sequence. Default: 0 512 1024 1900, as far as the models' context goes."""
    tokens: int = 32
    """Tokens of one measurement."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@dataclass(frozen=True)
class Prefill:
    """Tokens a second of a prompt that is fed at once."""

    models: Models
    prompts: tuple[int, ...] | None = None
    """Lengths of prompts. Default: 128 512, as far as the models' context goes."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


@dataclass(frozen=True)
class Load:
    """Time from the start of a process to the first token, and memory beside file and cache."""

    models: Models
    context: int = 512
    """Tokens that the sequence is filled with for the peak of memory."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


Arguments = (
    Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Prefill, tyro.conf.subcommand("prefill")]
    | Annotated[Load, tyro.conf.subcommand("load")]
)


def run(arguments: Decode | Prefill | Load) -> None:
    options = arguments.options
    _check(arguments)
    threads = options.threads or default_threads()
    peers, notes = _peers(options.peers)

    with tempfile.TemporaryDirectory(prefix="mobilellm-bench-") as folder:
        taking_part = entries(arguments.models, peers, Path(folder), _say, options.kv_cache)
        results = _measured(arguments, taking_part, threads)
    notes += results.notes
    if options.json is not None:
        _write_json(options.json, arguments, threads, results, notes)
    if options.png is not None:
        with atomic_write(options.png) as temporary:
            temporary.write_bytes(results.picture(f"{environment(())['cpu']}, {threads} threads"))
    if options.json != Path("-"):
        print_table(results.header, results.rows)
        written = [f"Written: {path}" for path in (options.json, options.png) if path is not None]
        counted = ", ".join(
            f"{count} {name}{'s' * (count != 1)}"
            for count, name in ((threads, "thread"), (options.rounds, "round"))
        )
        print_notes([f"{environment(())['cpu']}; {counted}.", *notes, *written])


def _measured(arguments: Decode | Prefill | Load, taking_part: Sequence[Entry], threads: int) -> Results:
    rounds = arguments.options.rounds
    match arguments:
        case Decode():
            depths = _fitting("depths", arguments.depths, _DEPTHS, taking_part, arguments.tokens)
            with _bar() as progress:
                outcome = race_decode(taking_part, depths, arguments.tokens, rounds, threads, progress)
            return of_timings(outcome)
        case Prefill():
            prompts = _fitting("prompts", arguments.prompts, _PROMPTS, taking_part, 0)
            with _bar() as progress:
                outcome = race_prefill(taking_part, prompts, rounds, threads, progress)
            return of_timings(outcome)
        case Load():
            _fitting("context", (arguments.context,), (), taking_part, 0)
            with _bar() as progress:
                return of_starts(*cold_starts(taking_part, arguments.context, rounds, threads, progress))


def _fitting(
    name: str,
    asked: tuple[int, ...] | None,
    usual: tuple[int, ...],
    taking_part: Sequence[Entry],
    beyond: int,
) -> tuple[int, ...]:
    """The lengths to measure: those asked for, which must fit every model, or the usual ones that do."""
    context, model = min((entry.context, entry.model) for entry in taking_part)
    if asked is None:
        return tuple(length for length in usual if length + beyond <= context) or (context - beyond,)
    for length in asked:
        if length + beyond > context:
            needed = f"{length} and {beyond} tokens after it" if beyond else str(length)
            raise ValueError(f"{name} = {needed} do not fit {model}, whose context is {context}; take fewer")
    return asked


def _peers(wanted: bool) -> tuple[list[str], list[str]]:
    """The peers that are installed, and a line for each that is not."""
    installed, notes = [], []
    for peer in PEERS if wanted else ():
        kind = KINDS[peer]
        if missing_packages(*kind.packages):
            notes.append(f"{kind.label} is not installed; to measure it: {install_command(kind.extra)}")
        else:
            installed.append(peer)
    return installed, notes


def _say(what: str) -> None:
    print(f"mobilellm: {what}", file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Progress]:
    with LiveBar(transient=True) as bar:
        yield lambda done, total, whose: bar.show(done, whose, total)


def _write_json(
    path: Path, arguments: Decode | Prefill | Load, threads: int, results: Results, notes: Sequence[str]
) -> None:
    machine = environment(_PACKAGES)
    here = {"build_commit": machine["commit"], "cpu_info": machine["cpu"]}
    written: dict[str, Any] = {
        "measured": type(arguments).__name__.lower(),
        "machine": machine,
        "threads": threads,
        "rounds": arguments.options.rounds,
        "tests": [here | record for record in results.records],
        "notes": list(notes),
    }
    text = json.dumps(written, indent=2)
    if path == Path("-"):
        print(text)
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _check(arguments: Decode | Prefill | Load) -> None:
    """Refuse before anything is measured what could not be done or written."""
    options = arguments.options
    if not arguments.models:
        raise ValueError("bench: name at least one model, e.g. 125m:Q8_0")
    counts: dict[str, tuple[int, ...]] = {"rounds": (options.rounds,)}
    match arguments:
        case Decode():
            counts["tokens"] = (arguments.tokens,)
            if any(depth < 0 for depth in arguments.depths or ()):
                raise ValueError(f"depths = {min(arguments.depths or ())} must be at least 0")
        case Prefill():
            counts["prompts"] = arguments.prompts or ()
        case Load():
            if arguments.context < 2:
                raise ValueError(f"context = {arguments.context} must be at least 2")
    for name, values in counts.items():
        for value in values:
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise ValueError(f"threads = {options.threads} must lie in 1 … {MOST_THREADS}")
    if options.png is not None:
        if options.png.suffix != ".png":
            raise ValueError(f"{options.png}: the name of the picture must end in .png")
        import matplotlib  # noqa: F401  # missing, it is better told now
