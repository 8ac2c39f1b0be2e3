"""Token shards: flat little-endian uint16/uint32 files that are memory-mapped, and one index.json.

Every document is stored as BOS, its tokens, EOS. The index says what was tokenised, by which tokenizer, how
many tokens, documents and bytes of text each split has, and the sha256 of every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.atomic import atomic_directory, check_destination
from mobilellm.data.documents import Document
from mobilellm.tokenizer import Tokenizer

FORMAT = "mobilellm-shards-1"
SPLITS = ("train", "held-out")
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
    shards: tuple[Shard, ...]

    def total(self, split: str, field: str) -> int:
        return sum(int(getattr(shard, field)) for shard in self.shards if shard.split == split)


def write_shards(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    source: str,
    licence: str,
    held_out: float = 0.05,
    overwrite: bool = False,
) -> ShardIndex:
    """Tokenise documents into `directory`, whole or not at all. Raises ShardError if nothing is left.

    A document is held out by the hash of its text, so the split does not depend on order, and a text never
    stands on both sides. Of two or more texts each side has at least one, however small `held_out` is.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out} must lie between 0 and 1; it is a share of the documents")
    check_destination(directory, overwrite)  # before the work, not after it
    chosen, rejected = _distinct(documents)
    if len(chosen) < 2:
        raise ShardError(
            f"{source}: {len(chosen)} different documents with text ({_counts(rejected)}); at least 2 are "
            "needed, one to train on and one to hold out; give more text"
        )
    sides = _split(chosen, held_out)
    dtype = np.dtype(DTYPES[0] if tokenizer.vocab_size <= 2**16 else DTYPES[1])
    with atomic_directory(directory, overwrite) as temporary:
        shards = tuple(_write(temporary, split, side, tokenizer, dtype) for split, side in sides.items())
        index = ShardIndex(
            FORMAT, dtype.str, tokenizer.vocab_size, tokenizer.fingerprint, source, licence, rejected, shards
        )
        (temporary / "index.json").write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
    return index


def read_index(directory: Path) -> ShardIndex:
    """The index of a folder of shards. Raises FileNotFoundError or ShardError."""
    file = directory / "index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no index.json there; it is not a folder of shards")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{file}: not JSON ({error}); prepare the data again") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ShardError(f"{file}: format {found!r} is not {FORMAT!r}; prepare the data again")
    try:
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        index = ShardIndex(**values, shards=shards)
    except (KeyError, TypeError) as error:
        raise ShardError(f"{file}: not a shard index ({error}); prepare the data again") from None
    if problem := _problem(index):
        raise ShardError(f"{file}: {problem}; prepare the data again")
    return index


def read_split(directory: Path, split: str, tokenizer: Tokenizer | None = None) -> NDArray[np.integer[Any]]:
    """All tokens of a split. With a tokenizer, its fingerprint must be the one the shards were made with.

    Raises ShardError for missing or shortened files and another tokenizer. `verify` compares the bytes.
    """
    index = read_index(directory)
    if tokenizer is not None and tokenizer.fingerprint != index.tokenizer:
        raise ShardError(
            f"{directory}: made with tokenizer {index.tokenizer[:12]}…, not with this one "
            f"({tokenizer.fingerprint[:12]}…); prepare the data again with it"
        )
    dtype, parts = np.dtype(index.dtype), []
    for shard in index.shards:
        if shard.split == split:
            file = directory / shard.file
            if not file.is_file() or file.stat().st_size != shard.tokens * dtype.itemsize:
                raise ShardError(f"{file}: missing or not {shard.tokens} tokens long; prepare the data again")
            parts.append(np.memmap(file, dtype=dtype, mode="r"))
    if not parts:
        splits = sorted({shard.split for shard in index.shards})
        raise ShardError(f"{directory}: has no split {split!r}; it has {', '.join(splits)}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def verify(directory: Path) -> None:
    """Compare every file with its sha256. Raises ShardError."""
    for shard in read_index(directory).shards:
        file = directory / shard.file
        if not file.is_file() or _sha256(file) != shard.sha256:
            raise ShardError(f"{file}: its bytes are not those that were written; prepare the data again")


def _distinct(documents: Iterable[Document]) -> tuple[dict[bytes, Document], dict[str, int]]:
    """Documents by the sha256 of their text, in order, and how many were rejected for which reason."""
    chosen: dict[bytes, Document] = {}
    rejected = {"empty": 0, "duplicate": 0, "not Unicode": 0}
    for document in documents:
        try:
            digest = hashlib.sha256(document.text.encode()).digest()
        except UnicodeEncodeError:  # lone surrogates, as JSON can carry them
            rejected["not Unicode"] += 1
            continue
        if not document.text.strip():
            rejected["empty"] += 1
        elif digest in chosen:
            rejected["duplicate"] += 1
        else:
            chosen[digest] = document
    return chosen, rejected


def _split(chosen: dict[bytes, Document], held_out: float) -> dict[str, list[Document]]:
    """Hold out the texts whose hash lies below a bound; the lowest always, the highest never."""
    lowest, highest = min(chosen), max(chosen)
    sides: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for digest, document in chosen.items():
        below = int.from_bytes(digest[:8], "big") < held_out * 2**64
        out = digest == lowest or (below and digest != highest)
        sides[SPLITS[out]].append(document)
    return sides


def _write(
    directory: Path, split: str, documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Shard:
    file = directory / f"{split}-00000.bin"
    tokens = 0
    with file.open("wb") as stream:
        for start in range(0, len(documents), 256):
            texts = [document.text for document in documents[start : start + 256]]
            for ids in tokenizer.encode_batch(texts, eos=True):
                stream.write(np.asarray(ids, dtype=dtype).tobytes())
                tokens += len(ids)
    return Shard(
        split=split,
        file=file.name,
        tokens=tokens,
        documents=len(documents),
        bytes=sum(len(document.text.encode()) for document in documents),
        words=sum(len(document.text.split()) for document in documents),
        sha256=_sha256(file),
    )


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
    if index.dtype not in DTYPES:
        return f"dtype = {index.dtype!r} must be one of {', '.join(DTYPES)}"
    for shard in index.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".."):
            return f"file = {shard.file!r} must be the name of a file beside it"
    if type(index.rejected) is not dict:
        return f"rejected = {index.rejected!r} must be numbers of documents by reason"
    return "" if index.shards else "it lists no shards"


def _counts(rejected: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
