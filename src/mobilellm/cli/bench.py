"""How fast models run on this machine, how much memory they take, and what other runtimes make of them.

MODEL is a .gguf file, a model directory (run by PyTorch), or SHAPE:TYPE for random weights, e.g. 125m:Q8_0.
All that is measured takes turns in one run, every contestant in a process of its own, so that ratios hold on
a machine that does other things too. With --peers, llama.cpp and transformers run the same weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mobilellm.atomic import atomic_write, check_file_writable
from mobilellm.bench.contestant import KINDS, PEERS, Peer
from mobilellm.bench.entries import Entry, entries
from mobilellm.bench.race import Progress, race_decode, race_prefill
from mobilellm.bench.starts import cold_starts
from mobilellm.bench.thread_race import race_threads
from mobilellm.cli.bench_output import Results, of_starts, of_threads, of_timings
from mobilellm.cli.notices import say
from mobilellm.cli.tables import print_notes, print_table
from mobilellm.environment import environment
from mobilellm.installation import install_command, missing_packages
from mobilellm.report.live_bar import LiveBar
from mobilellm.runtime.cores import cores, default_threads
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.runtime.thread_choice import counts_up_to, thread_choices

_PACKAGES = ("mobilellm", "numpy", "torch", "transformers", "llama-cpp-python")
_DEPTHS, _PROMPTS, _PROMPT, _CONTEXT = (0, 512, 1024, 1900), (128, 512), (256,), (512,)
_LEAST = {"rounds": 1, "depths": 0, "tokens": 1, "prompts": 1, "prompt": 1, "context": 2, "counts": 1}

Models = Annotated[
    tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(name="models", metavar="MODEL [MODEL ...]")
]


@dataclass(frozen=True)
class Options:
    rounds: int = 5
    """How often each is measured; the median counts. One round more, the first, warms up."""
    kv_cache: tuple[KVCacheType, ...] = ("f16",)
    """In which type .gguf files keep keys and values; f16 q8_0 measures both."""
    json: Path | None = None
    """Write all numbers here, under llama-bench's names; - prints them instead of the table."""
    png: Path | None = None
    """Draw bars into this file."""


@dataclass(frozen=True)
class RaceOptions(Options):
    threads: int | None = None
    """Of every runtime, always so many; by default one a fast core, four at most."""
    peers: Annotated[tuple[Peer, ...] | None, tyro.conf.arg(metavar="[{llama.cpp,transformers} ...]")] = None
    """Measure these on the same weights, without a name both; one that is not installed is named."""


@dataclass(frozen=True)
class Decode:
    """Tokens a second, one token at a time, after so many others; and the share of the memory's bandwidth."""

    models: Models
    depths: tuple[int, ...] | None = None
    """Tokens already in the sequence. Default: 0 512 1024 1900, as far as the models' context goes."""
    tokens: int = 32
    """Tokens of one measurement."""
    options: Annotated[RaceOptions, tyro.conf.arg(name="")] = field(default_factory=RaceOptions)


@dataclass(frozen=True)
class Prefill:
    """Tokens a second of a prompt that is fed at once."""

    models: Models
    prompts: tuple[int, ...] | None = None
    """Lengths of prompts. Default: 128 512, as far as the models' context goes."""
    options: Annotated[RaceOptions, tyro.conf.arg(name="")] = field(default_factory=RaceOptions)


@dataclass(frozen=True)
class Load:
    """Time from the start of a process to the first token, and memory beside file and cache."""

    models: Models
    context: int | None = None
    """Tokens that the sequence is filled with for the peak of memory. Default: 512, or as many as the models'
    context has."""
    options: Annotated[RaceOptions, tyro.conf.arg(name="")] = field(default_factory=RaceOptions)


@dataclass(frozen=True)
class Threads:
    """Decoding and a prompt on 1, 2, 3 … threads, and the best of these numbers, of .gguf files."""

    models: Models
    counts: tuple[int, ...] | None = None
    """Numbers of threads. Default: 1 2 3 4 6 8 12 …, as far as the cores that this process may use go."""
    tokens: int = 32
    """Tokens that are decoded in one measurement."""
    prompt: int | None = None
    """Tokens of the prompt. Default: 256, or as many as the models' context has."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


Arguments = (
    Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Prefill, tyro.conf.subcommand("prefill")]
    | Annotated[Load, tyro.conf.subcommand("load")]
    | Annotated[Threads, tyro.conf.subcommand("threads")]
)


def run(arguments: Decode | Prefill | Load | Threads) -> None:
    options = arguments.options
    _check(arguments)
    peers, notes = _peers(options.peers if isinstance(options, RaceOptions) else None)

    with tempfile.TemporaryDirectory(prefix="mobilellm-bench-") as folder:
        taking_part = entries(arguments.models, peers, Path(folder), say, options.kv_cache)
        results = _measured(arguments, taking_part)
    notes += results.notes
    machine = environment(())["cpu"]
    ran = [_counted(options.rounds, "round")]
    if isinstance(options, RaceOptions):
        ran.insert(0, _counted(_threads(options), "thread"))
    if options.json is not None:
        _write_json(options.json, arguments, results, notes)
    if options.png is not None:
        with atomic_write(options.png) as temporary:
            temporary.write_bytes(results.picture(", ".join([machine, *ran[:-1]])))
    if options.json != Path("-"):
        print_table(results.header, results.rows)
        written = [f"Written: {path}" for path in (options.json, options.png) if path is not None]
        print_notes([f"{machine}; {', '.join(ran)}.", *notes, *written])


def _measured(arguments: Decode | Prefill | Load | Threads, taking_part: Sequence[Entry]) -> Results:
    rounds = arguments.options.rounds
    match arguments:
        case Decode():
            depths = _fitting("depths", arguments.depths, _DEPTHS, taking_part, arguments.tokens)
            threads = _threads(arguments.options)
            with _bar() as progress:
                outcome = race_decode(taking_part, depths, arguments.tokens, rounds, threads, progress)
            return of_timings(outcome)
        case Prefill():
            prompts = _fitting("prompts", arguments.prompts, _PROMPTS, taking_part, 0)
            with _bar() as progress:
                outcome = race_prefill(taking_part, prompts, rounds, _threads(arguments.options), progress)
            return of_timings(outcome)
        case Load():
            asked = None if arguments.context is None else (arguments.context,)
            (context,) = _fitting("context", asked, _CONTEXT, taking_part, 0)
            threads = _threads(arguments.options)
            with _bar() as progress:
                return of_starts(*cold_starts(taking_part, context, rounds, threads, progress))
        case Threads(tokens=tokens, prompt=prompt):
            _fitting("tokens", (tokens,), (), taking_part, 0)
            asked = None if prompt is None else (prompt,)
            (prompt,) = _fitting("prompt", asked, _PROMPT, taking_part, 0)
            counts = list(dict.fromkeys(arguments.counts or counts_up_to(cores().usable)))
            with _bar() as progress:
                return of_threads(race_threads(taking_part, counts, tokens, prompt, rounds, progress))


def _threads(options: RaceOptions) -> int:
    return options.threads or default_threads()


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


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


def _peers(named: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Those that are installed of the peers named, of all where there is no name; a line for each other."""
    installed, notes = [], []
    for peer in () if named is None else dict.fromkeys(named or PEERS):
        kind = KINDS[peer]
        if missing_packages(*kind.packages):
            notes.append(f"{kind.label} is not installed; to measure it: {install_command(kind.extra)}")
        else:
            installed.append(peer)
    return installed, notes


@contextmanager
def _bar() -> Iterator[Progress]:
    with LiveBar(transient=True) as bar:
        yield lambda done, total, whose: bar.show(done, whose, total)


def _write_json(
    path: Path, arguments: Decode | Prefill | Load | Threads, results: Results, notes: Sequence[str]
) -> None:
    options = arguments.options
    machine = environment(_PACKAGES)
    here = {"build_commit": machine["commit"], "cpu_info": machine["cpu"]}
    written: dict[str, Any] = {
        "measured": type(arguments).__name__.lower(),
        "machine": machine,
        **({"threads": _threads(options)} if isinstance(options, RaceOptions) else {}),
        "rounds": options.rounds,
        "tests": [here | record for record in results.records],
        **({"best_threads": results.best_threads} if results.best_threads else {}),
        "notes": list(notes),
    }
    text = json.dumps(written, indent=2)
    if path == Path("-"):
        print(text)
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _check(arguments: Decode | Prefill | Load | Threads) -> None:
    """Refuse before anything is measured what could not be done or written."""
    options = arguments.options
    if not arguments.models:
        raise ValueError("bench: name at least one model, e.g. 125m:Q8_0")
    given = vars(options) | vars(arguments)
    for name, least in _LEAST.items():
        values = given.get(name)
        if values == ():
            raise ValueError(f"--{name} needs a value")
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and value < least:
                raise ValueError(f"{name} = {value} must be at least {least}")
    if not options.kv_cache:
        raise ValueError("--kv-cache needs a value: f16, q8_0 or both")
    for count in (given.get("threads"), *(given.get("counts") or ())):
        thread_choices(count)
    for path in (options.json, options.png):
        if path not in (None, Path("-")):
            check_file_writable(path)
    if options.png is not None:
        if options.png.suffix != ".png":
            raise ValueError(f"{options.png}: the name of the picture must end in .png")
        import matplotlib  # noqa: F401  # missing, it is better told now
