"""Train a tokenizer on your text: `mobilellm tokenizer train TEXT... --vocab-size N --out DIR`.

A byte-fallback BPE vocabulary in the layout of Llama, with <unk> <s> </s> as 0 1 2. TEXT is what `mobilellm
prepare` takes. Of a large corpus a bounded part is used, the same for the same texts: see --sample-megabytes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Arguments:
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT...")]
    """Files, folders, patterns, - for standard input, or data sets on the Hub."""
    out: Path
    """Directory to write; it appears whole or not at all."""
    vocab_size: int
    """Pieces of the vocabulary, the 259 special and byte pieces included."""
    text_field: str = "text"
    """Field of JSON lines, column of parquet and of data sets that holds the text."""
    format: Literal["text", "jsonl", "parquet"] | None = None
    """What files are whose names do not tell, and standard input."""
    document_separator: str = ""
    """What ends a document in plain text, for example "<|endoftext|>"; it stays out of the vocabulary."""
    sample_megabytes: float = 100.0
    """Text to train on. Of more, the parts (16,384 characters each) with the lowest hashes are taken."""
    character_coverage: float = 0.9995
    """Part of the text whose characters get pieces; bytes spell the rarer ones."""
    min_frequency: int = 2
    """How often a pair must be seen to be merged."""
    max_piece_length: int = 16
    """Characters of the longest piece."""
    hub_config: str | None = None
    """Configuration of a data set on the Hub."""
    hub_split: str = "train"
    """Split of a data set on the Hub."""
    overwrite: bool = False
    """Replace the directory if it exists."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.atomic import atomic_directory, check_destination, made_of
    from mobilellm.data.prepare_settings import PrepareSettings
    from mobilellm.data.sample import sample_texts
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.tokenizer_training import check_training

    started = time.monotonic()
    limits = (arguments.character_coverage, arguments.min_frequency, arguments.max_piece_length)
    check_training(arguments.vocab_size, *limits)
    if not 1e-6 <= arguments.sample_megabytes < float("inf"):
        raise ValueError(f"sample_megabytes = {arguments.sample_megabytes} must be a number above 0")
    not_a_tokenizer = made_of("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    check_destination(arguments.out, arguments.overwrite, not_a_tokenizer)
    settings = PrepareSettings(
        text_field=arguments.text_field,
        format=arguments.format,
        separator=arguments.document_separator,
        hub_config=arguments.hub_config,
        hub_split=arguments.hub_split,
    )
    sample = sample_texts(arguments.inputs, settings, int(arguments.sample_megabytes * 1e6), _Lines().update)
    print(
        f"training on {sample.sample_bytes / 1e6:,.1f} of {sample.text_bytes / 1e6:,.1f} MB of text",
        file=sys.stderr,
    )
    tokenizer = Tokenizer.train(sample.texts, arguments.vocab_size, *limits)
    with atomic_directory(arguments.out, arguments.overwrite, not_a_tokenizer) as temporary:
        tokenizer.save(temporary)
    some = sample.texts[:100]
    tokens = sum(map(len, tokenizer.encode_batch(some, bos=False)))
    facts = {
        "out": str(arguments.out),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "text_bytes": sample.text_bytes,
        "sample_bytes": sample.sample_bytes,
        "sample_parts": len(sample.texts),
        "records_without_text": sample.unread,
        "bytes_per_token": round(sum(len(text.encode()) for text in some) / tokens, 3),
        "seconds": round(time.monotonic() - started, 3),
    }
    if arguments.json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        print(f"{key:<22} {value}")


class _Lines:
    """A line now and then while a large corpus is read."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 10

    def update(self, text_bytes: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 10
            print(f"read {text_bytes / 1e6:,.0f} MB of text", file=sys.stderr, flush=True)
