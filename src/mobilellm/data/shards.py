"""Token shards: flat little-endian uint16/uint32 files that are memory-mapped, and one index.json.

Every document is stored as BOS, its tokens, EOS. The index says what was tokenised, by which tokenizer, how
many tokens, documents and bytes of text each split has, and the sha256 of every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.atomic import atomic_directory
from mobilellm.data.documents import Document
from mobilellm.tokenizer import Tokenizer

FORMAT = "mobilellm-shards-1"
SPLITS = ("train", "held-out")


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
    stands on both sides.
    """
    sides: dict[str, list[Document]] = {split: [] for split in SPLITS}
    rejected = {"empty": 0, "duplicate": 0}
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode("utf-8", "replace")).digest()
        if not document.text.strip():
            rejected["empty"] += 1
        elif digest in seen:
            rejected["duplicate"] += 1
        else:
            seen.add(digest)
            sides[SPLITS[int.from_bytes(digest[:8], "big") < held_out * 2**64]].append(document)
    for split, chosen in sides.items():
        if not chosen:
            raise ShardError(
                f"{source}: {len(seen)} documents leave none for the {split} split; give more text"
            )
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    with atomic_directory(directory, overwrite) as temporary:
        shards = tuple(_write(temporary, split, chosen, tokenizer, dtype) for split, chosen in sides.items())
        index = ShardIndex(
            FORMAT, dtype.str, tokenizer.vocab_size, tokenizer.fingerprint, source, licence, rejected, shards
        )
        text = json.dumps(asdict(index), indent=2, ensure_ascii=False) + "\n"
        (temporary / "index.json").write_text(text, encoding="utf-8")
    return index


def read_index(directory: Path) -> ShardIndex:
    file = directory / "index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: no index.json there; it is not a folder of shards")
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        index = ShardIndex(**values, shards=shards)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{file}: not a shard index ({error}); prepare the data again") from None
    if index.format != FORMAT:
        raise ShardError(f"{file}: format {index.format!r} is not {FORMAT!r}; prepare the data again")
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
            file = directory / Path(shard.file).name
            if not file.is_file() or file.stat().st_size != shard.tokens * dtype.itemsize:
                raise ShardError(f"{file}: missing or not {shard.tokens} tokens long; prepare the data again")
            parts.append(np.memmap(file, dtype=dtype, mode="r"))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def verify(directory: Path) -> None:
    """Compare every file with its sha256. Raises ShardError."""
    for shard in read_index(directory).shards:
        file = directory / Path(shard.file).name
        if not file.is_file() or _sha256(file) != shard.sha256:
            raise ShardError(f"{file}: its bytes are not those that were written; prepare the data again")


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


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
