"""index.json of a folder of token shards: what was tokenised, by which tokenizer, and every file's sha256."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write, made_of

FORMAT = "mobilellm-shards-2"
FORMATS = ("mobilellm-shards-1", FORMAT)
SPLITS = ("train", "held-out")
not_shards = made_of("index.json", "*.bin", "rejected.jsonl", "tokenizer/*")
"""An objection to overwriting a folder that holds something else than shards."""
DTYPES = ("<u2", "<u4")


class ShardError(ValueError):
    """A folder of shards that is damaged or does not fit; the message names the file and the mend."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `bytes` counts the UTF-8 bytes of its text, for bits per byte."""

    split: str
    file: str
    tokens: int
    documents: int
    bytes: int
    words: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    format: str
    dtype: str
    vocab_size: int
    tokenizer: str  # fingerprint
    source: str
    licence: str
    rejected: dict[str, int]  # reason -> documents
    preparation: dict[str, Any]  # settings the documents were chosen by; {} where nothing is known
    shards: tuple[Shard, ...]

    def total(self, split: str, field: str) -> int:
        return sum(int(getattr(shard, field)) for shard in self.shards if shard.split == split)


def dtype_of(vocab_size: int) -> str:
    """The smallest of DTYPES that holds every id."""
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size = {vocab_size} must lie in 1 … {2**32}")
    return DTYPES[0] if vocab_size <= 2**16 else DTYPES[1]


def make_index(
    vocab_size: int,
    tokenizer: str,
    source: str,
    licence: str,
    rejected: Mapping[str, int],
    shards: tuple[Shard, ...],
    preparation: Mapping[str, Any] | None = None,
) -> ShardIndex:
    """An index of today's format. `tokenizer` is the fingerprint."""
    return ShardIndex(
        FORMAT, dtype_of(vocab_size), vocab_size, tokenizer, source, licence, dict(rejected),
        dict(preparation or {}), shards,
    )  # fmt: skip


def write_index(directory: Path, index: ShardIndex) -> None:
    """Write index.json, whole or not at all. It comes last: a folder without one holds no shards."""
    with atomic_write(directory / "index.json") as temporary:
        temporary.write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")


def read_index(directory: Path, may_be_empty: bool = False) -> ShardIndex:
    """The index of a folder of shards. Raises FileNotFoundError or ShardError."""
    file = directory / "index.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory}: no index.json there; it is no folder of shards "
            "(mobilellm prepare TEXT --tokenizer DIR --out FOLDER makes one)"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{file}: not JSON ({error}); prepare the data again") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found not in FORMATS:
        raise ShardError(f"{file}: format {found!r} is not {FORMAT!r}; prepare the data again")
    if found == FORMATS[0]:
        values = {"preparation": {}} | values
    try:
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        index = ShardIndex(**values, shards=shards)
    except (KeyError, TypeError) as error:
        raise ShardError(f"{file}: not a shard index ({error}); prepare the data again") from None
    if problem := _problem(index) or ("" if index.shards or may_be_empty else "it lists no shards"):
        raise ShardError(f"{file}: {problem}; prepare the data again")
    return index


def _problem(index: ShardIndex) -> str:
    """What is wrong with the values of an index as read, or ""."""
    parts: tuple[ShardIndex | Shard, ...] = (index, *index.shards)
    for part in parts:
        for field in fields(part):
            value = getattr(part, field.name)
            if field.type == "str" and not isinstance(value, str):
                return f"{field.name} = {value!r} must be text"
            if field.type == "int" and (type(value) is not int or value < 1):
                return f"{field.name} = {value!r} must be a whole number, at least 1"
            if str(field.type).startswith("dict") and type(value) is not dict:
                return f"{field.name} = {value!r} must be values by name"
    for shard in index.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".."):
            return f"file = {shard.file!r} must be the name of a file beside it"
    if index.dtype not in DTYPES:
        return f"dtype = {index.dtype!r} must be one of {', '.join(DTYPES)}"
    return ""
