"""What is taken from the input and how; and how to tell that two commands would make the same shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobilellm.data.chunks import Cutting
from mobilellm.data.inputs import STDIN, Format, Source, Sources, find_sources
from mobilellm.data.quality import QualityRules
from mobilellm.data.shard_index import SPLITS, ShardError, ShardIndex, read_index
from mobilellm.data.shard_writer import SHARD_TOKENS
from mobilellm.data.shards import read_split
from mobilellm.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrepareSettings:
    """What is taken from the input, and how. All of it decides the bytes that come out."""

    text_field: str = "text"
    format: Format | None = None
    separator: str = ""
    blank_lines: bool = False
    held_out: float = 0.005
    deduplicate: bool = True
    near_duplicates: float | None = None  # Jaccard similarity
    min_characters: int = 0
    max_characters: int | None = None
    quality: QualityRules | None = None
    limit: int | None = None
    shard_tokens: int = SHARD_TOKENS
    source: str = ""
    licence: str = "not stated"
    hub_config: str | None = None
    hub_split: str = "train"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out} must lie between 0 and 1: a share of the documents")
        if self.separator and self.blank_lines:
            raise ValueError("documents end either at a separator or at blank lines; choose one")
        if self.limit is not None and self.limit < 2:
            raise ValueError(
                f"limit = {self.limit} must be at least 2: one document to train on, one held out"
            )
        low, high = self.min_characters, self.max_characters
        if low < 0 or (high is not None and high < max(1, low)):
            raise ValueError(f"characters: at least {low} and at most {high} leave no document")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens = {self.shard_tokens} must be at least 1")

    @property
    def cutting(self) -> Cutting:
        return Cutting(self.separator, self.blank_lines)


def sources_of(inputs: Sequence[str], settings: PrepareSettings) -> Sources:
    """The sources that `inputs` name. Raises ValueError, too, for a setting that none of them takes."""
    sources = find_sources(inputs, settings.format)
    formats = {source.format for source in sources.read}
    for flag, is_given, takes, what in (
        ("--document-separator cuts", bool(settings.separator), {"text"}, "plain text"),
        ("--split-on-blank-lines cuts", settings.blank_lines, {"text"}, "plain text"),
        ("--hub-config is for", settings.hub_config is not None, {"hub"}, "data sets on the Hub"),
        ("--hub-split is for", settings.hub_split != "train", {"hub"}, "data sets on the Hub"),
    ):
        if is_given and not formats & takes:
            raise ValueError(f"{flag} {what}, and the inputs hold none of it; leave it out")
    if settings.text_field != "text" and formats == {"text"}:
        raise ValueError(
            "--text-field names a field of records, and the inputs are plain text; leave it out, or say what "
            "they are with --format"
        )
    return sources


def preparation_of(sources: Sources, settings: PrepareSettings) -> dict[str, Any]:
    """What decides the shards beside the tokenizer; it stands in their index."""
    inputs = json.dumps([[source.name, source.format, source.size] for source in sources.read])
    named = {key: value for key, value in asdict(settings).items() if key not in ("source", "licence")}
    return {
        "number_of_inputs": len(sources.read),
        "inputs": hashlib.sha256(inputs.encode()).hexdigest(),
        **named,
    }


def command_of(sources: Sources, tokenizer: Tokenizer, settings: PrepareSettings) -> dict[str, Any]:
    """What must be the same to go on with unfinished work."""
    modified = json.dumps([source.modified for source in sources.read])
    return {
        "tokenizer": tokenizer.fingerprint,
        "source": settings.source,
        "licence": settings.licence,
        **preparation_of(sources, settings),
        "modification_times": hashlib.sha256(modified.encode()).hexdigest(),
    }


def already_done(
    out: Path, sources: Sources, tokenizer: Tokenizer, settings: PrepareSettings
) -> ShardIndex | None:
    """The index, if the same command has made `out` already and no input has changed since."""
    file = out / "index.json"
    if not file.is_file() or any(source.name == STDIN for source in sources.read):
        return None  # what standard input would give cannot be compared
    try:
        index = read_index(out)
        for split in SPLITS:
            read_split(out, split)  # are its files there?
    except ShardError:
        return None  # `check_destination` will refuse or replace it
    same = (
        index.preparation == json.loads(json.dumps(preparation_of(sources, settings)))
        and index.tokenizer == tokenizer.fingerprint
        and index.source == (settings.source or name_of(sources.read))
        and index.licence == settings.licence
    )
    newest = max(source.modified for source in sources.read)
    return index if same and newest < file.stat().st_mtime_ns else None


def name_of(sources: Sequence[Source]) -> str:
    names = ["standard input" if source.name == STDIN else source.name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
