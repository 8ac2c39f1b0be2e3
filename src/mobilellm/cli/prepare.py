"""From raw text to token shards: any size, all cores, interrupted and gone on with as you like.

INPUT is files, folders, patterns, `-` for standard input, or a data set on the Hub (org/name or
hf://org/name): text, JSON lines or parquet, each plain or packed with gz, xz, bz2 or zst. What is rejected is
counted in OUT/index.json and listed in OUT/rejected.jsonl. Stopped or killed, the same command goes on from
OUT.partial; the bytes that come out are the same.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilellm.data.quality import QualityRules

if TYPE_CHECKING:
    from mobilellm.data.prepare import Prepared
    from mobilellm.data.prepare_settings import PrepareSettings


@dataclass
class Arguments:
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="INPUT...")]
    """Files, folders, patterns, - for standard input, or data sets on the Hub."""
    tokenizer: Path
    """Tokenizer directory, tokenizer.json or tokenizer.model (see `mobilellm tokenizer train`)."""
    out: Path
    """Folder of shards to write; it appears when it is whole."""
    text_field: str = "text"
    """Field of JSON lines, column of parquet and of data sets that holds the text."""
    format: Literal["text", "jsonl", "parquet"] | None = None
    """What files are whose names do not tell, and standard input."""
    document_separator: str = ""
    """Cut plain text at this, for example "<|endoftext|>"; by default a file is one document."""
    split_on_blank_lines: bool = False
    """Cut plain text at blank lines."""
    held_out: float = 0.005
    """Share of the documents held out, chosen by the hash of their text."""
    keep_duplicates: bool = False
    """Keep texts that came before, byte for byte."""
    near_duplicates: float | None = None
    """Reject texts this similar to an earlier one (Jaccard of five-word runs, by MinHash; 0.8 is usual)."""
    min_characters: int = 0
    """Reject shorter texts."""
    max_characters: int | None = None
    """Reject longer texts."""
    quality: bool = False
    """Reject texts that break one of the --rules (symbols and repetition, in the spirit of Gopher and C4)."""
    rules: QualityRules = field(default_factory=QualityRules)
    """Limits of --quality."""
    limit: int | None = None
    """Stop after this many documents."""
    shard_tokens: int = 100_000_000
    """Tokens after which a file is full."""
    source: str = ""
    """What the index calls the data; by default the names of the inputs."""
    licence: str = "not stated"
    """A note on the data's licence for the index."""
    hub_config: str | None = None
    """Configuration of a data set on the Hub."""
    hub_split: str = "train"
    """Split of a data set on the Hub."""
    workers: int | None = None
    """Processes that tokenise; by default one for each core. The bytes that come out do not depend on it."""
    checkpoint_seconds: float = 5.0
    """How much work a crash may cost."""
    overwrite: bool = False
    """Replace OUT if it exists; the old one goes only when the new one is complete."""
    fresh: bool = False
    """Throw away what an interrupted run left, and start over."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.cli.prepare_progress import PrepareProgress
    from mobilellm.data.prepare import Stopped, prepare
    from mobilellm.tokenizer import Tokenizer

    settings = _settings(arguments)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    stop = threading.Event()
    with _signals_set(stop) as caught, PrepareProgress(quiet=arguments.json) as progress:
        try:
            done = prepare(
                arguments.inputs,
                tokenizer,
                arguments.out,
                settings,
                workers=arguments.workers,
                overwrite=arguments.overwrite,
                fresh=arguments.fresh,
                checkpoint_seconds=arguments.checkpoint_seconds,
                report=progress.update,
                stop=stop,
            )
        except Stopped:
            print("\nStopped. What is done is safe; the same command goes on from there.", file=sys.stderr)
            sys.exit(128 + caught[0])
    facts = _facts(arguments.out, done)
    if arguments.json:
        print(json.dumps(facts))
    else:
        _print(arguments, facts)


def _settings(arguments: Arguments) -> PrepareSettings:
    from mobilellm.data.prepare_settings import PrepareSettings

    if arguments.rules != QualityRules() and not arguments.quality:
        raise ValueError("prepare: --rules are limits of --quality; give --quality too, or leave them out")
    return PrepareSettings(
        text_field=arguments.text_field,
        format=arguments.format,
        separator=arguments.document_separator,
        blank_lines=arguments.split_on_blank_lines,
        held_out=arguments.held_out,
        deduplicate=not arguments.keep_duplicates,
        near_duplicates=arguments.near_duplicates,
        min_characters=arguments.min_characters,
        max_characters=arguments.max_characters,
        quality=arguments.rules if arguments.quality else None,
        limit=arguments.limit,
        shard_tokens=arguments.shard_tokens,
        source=arguments.source,
        licence=arguments.licence,
        hub_config=arguments.hub_config,
        hub_split=arguments.hub_split,
    )


@contextmanager
def _signals_set(stop: threading.Event) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM stop between two chunks, where the work can be saved; a second one stops at once."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _facts(out: Path, done: Prepared) -> dict[str, Any]:
    """The summary, with the numbers of this run if it did anything."""
    from mobilellm.data.shard_index import SPLITS

    index, progress = done.index, done.progress
    facts: dict[str, Any] = {
        "out": str(out),
        "tokenizer": index.tokenizer,
        "vocab_size": index.vocab_size,
        "dtype": index.dtype,
        "source": index.source,
        "licence": index.licence,
        "files": len(index.shards),
        "splits": {
            split: {name: index.total(split, name) for name in ("documents", "tokens", "bytes", "words")}
            for split in SPLITS
        },
        "rejected": index.rejected,
        "passed_over": list(done.passed_over),
        "resumed": done.resumed,
    }
    if progress is not None:
        facts |= {
            "seconds": round(progress.seconds, 3),
            "megabytes_per_second": round(progress.session_bytes / 1e6 / max(progress.seconds, 1e-9), 3),
        }
    return facts


def _print(arguments: Arguments, facts: dict[str, Any]) -> None:
    if "seconds" not in facts:
        print(f"{arguments.out}: already made by the same command")
    for split, counts in facts["splits"].items():
        print(
            f"{split:<10} {counts['documents']:>12,} documents {counts['tokens']:>15,} tokens "
            f"{counts['bytes'] / 1e6:>12,.1f} MB {counts['bytes'] / counts['tokens']:>6.2f} bytes a token"
        )
    for reason, count in sorted(facts["rejected"].items(), key=lambda item: -item[1]):
        print(f"rejected   {count:>12,} {reason}")
    if facts["rejected"]:
        print(f"           listed in {arguments.out / 'rejected.jsonl'}")
    if facts["passed_over"]:
        names = facts["passed_over"]
        print(
            f"passed over {len(names):,} files whose names do not tell what they are ({names[0]}"
            f"{', …' if len(names) > 1 else ''}); --format tells"
        )
    if "seconds" in facts:
        print(f"{facts['seconds']:,.1f} s, {facts['megabytes_per_second']:,.1f} MB of text a second")
    print(f"{arguments.out}: {facts['files']} files, index.json, rejected.jsonl, tokenizer")
