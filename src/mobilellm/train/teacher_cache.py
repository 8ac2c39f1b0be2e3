"""A teacher's top k in files: its k likeliest next tokens at every place of a text, and how likely they are.

A passage is what a teacher sees at once: a row of tokens, or of rows that keep documents apart each document.
A folder holds cache.json, which says of which teacher and at which temperature, and parts, each a safetensors
file of R passages with P places in all:

    keys     (R, 32) uint8             sha256 of the passage: its tokens, and which places count
    starts   (R + 1,) int64            the places of passage r are starts[r] … starts[r + 1] - 1
    ids      (P, k) uint16 or int32    the likeliest tokens, in falling order
    logs     (P, k + 1) float16        logarithms of their probabilities; last that of all others together
    digests  (R, 32) uint8             sha256 over key, ids and logs of a passage, compared when it is read

Passages are found by what they hold: whatever deals them out, packed and shuffled as it may be, in each epoch
and on any number of devices, the same passage has the same top k, and those of other data are not there.
Parts are memory-mapped and appear whole or not at all: a kill loses at most the part that was being made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mobilellm.atomic import atomic_write

FORMAT = "mobilellm-teacher-cache-1"
PART_BYTES = 64 * 2**20
"""About the size at which a part is written."""
_DIGEST = 32
_ARRAYS = ("keys", "starts", "ids", "logs", "digests")

Ids = NDArray[np.integer[Any]]


class CacheError(ValueError):
    """A cache that is damaged, of another teacher, or lacks something; the message names it and the mend."""


@dataclass(frozen=True)
class CacheIdentity:
    """What the distributions in a cache depend on, apart from the text."""

    teacher: str
    """Fingerprint: SHA-256 over weights, configuration and tokenizer."""
    tokenizer: str
    """Fingerprint."""
    vocab_size: int
    """Tokens that the probabilities are of."""
    top_k: int
    temperature: float
    dtype: str


class Passage(NamedTuple):
    """tokens (T,) that a teacher sees at once; counted (T,) tells after which it is asked what comes next."""

    tokens: Ids
    counted: NDArray[np.bool_]

    @property
    def key(self) -> bytes:
        digest = hashlib.sha256(self.tokens.astype("<i4").tobytes())
        digest.update(self.counted.tobytes())
        return digest.digest()


class TopK(NamedTuple):
    """At the n places of a passage that count: ids (n, k), logs (n, k + 1)."""

    ids: Ids
    logs: NDArray[np.float16]


class TeacherCache:
    """The parts of a folder that are there now; made by `open_cache`."""

    def __init__(self, directory: Path, identity: CacheIdentity) -> None:
        self.directory, self.identity = directory, identity
        self._parts: dict[Path, Any] = {}
        self._places: dict[
            bytes, tuple[Path, int, int, bytes]
        ] = {}  # file, first place, the one after the last, digest
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """See the parts that were written since. Raises CacheError for one that is damaged."""
        for file in sorted(self.directory.glob("part-*.safetensors")):
            if file not in self._parts:
                self._open(file)

    def clear_remains(self) -> None:
        """Delete what a killed process was writing; none may write now."""
        for file in self.directory.glob("part-*.tmp-*"):
            file.unlink()

    def read(self, passage: Passage) -> TopK:
        """Raises CacheError where it is not there, or not what was written."""
        key = passage.key
        if key not in self._places:
            raise CacheError(
                f"{self.directory}: has nothing for a passage of this data; start the run again with "
                "distill.teacher named"
            )
        file, start, stop, digest = self._places[key]
        ids, logs = (self._parts[file].get_slice(name)[start:stop] for name in ("ids", "logs"))
        if _digest(key, ids, logs) != digest:
            raise _damaged(file, "a passage is not what was written, its sha256 differs")
        return TopK(ids, logs)

    def write(self, passages: list[tuple[bytes, TopK]], number: int) -> None:
        """Write passages as part `number`, whole or not at all."""
        keys = b"".join(key for key, _ in passages)
        digests = b"".join(_digest(key, *top) for key, top in passages)
        arrays: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(keys, np.uint8).reshape(-1, _DIGEST),
            "starts": np.cumsum([0, *(len(top.ids) for _, top in passages)], dtype=np.int64),
            "ids": np.concatenate([top.ids for _, top in passages]),
            "logs": np.concatenate([top.logs for _, top in passages]),
            "digests": np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST),
        }
        with atomic_write(self.directory / f"part-{number:06}.safetensors") as temporary:
            temporary.write_bytes(safetensors.numpy.save(arrays))

    @property
    def next_number(self) -> int:
        """Above that of every part there is."""
        return max((int(file.stem.removeprefix("part-")) for file in self._parts), default=-1) + 1

    def _open(self, file: Path) -> None:
        try:
            part: Any = safetensors.safe_open(file, framework="np")
            shapes = [tuple(part.get_slice(name).get_shape()) for name in _ARRAYS]
            keys, starts, digests = (part.get_tensor(name) for name in ("keys", "starts", "digests"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise _damaged(file, " ".join(str(error).split())) from None
        R, P, k = len(keys), int(starts[-1]) if len(starts) else 0, self.identity.top_k
        if (
            shapes != [(R, _DIGEST), (R + 1,), (P, k), (P, k + 1), (R, _DIGEST)]
            or starts[0] != 0
            or (np.diff(starts) < 0).any()
        ):
            raise _damaged(file, "its arrays do not fit each other")
        self._parts[file] = part
        for number in range(R):
            place = (file, int(starts[number]), int(starts[number + 1]), digests[number].tobytes())
            self._places.setdefault(keys[number].tobytes(), place)


def open_cache(directory: Path, identity: CacheIdentity | None) -> TeacherCache:
    """The cache in `directory`, which is made where there is none.

    Raises CacheError for one of another teacher, temperature or k; FileNotFoundError where
    there is none and `identity` is None: nobody could fill it.
    """
    file = directory / "cache.json"
    if not has_cache(directory):
        if identity is None:
            raise FileNotFoundError(
                f"{directory}: no teacher's cache there; name the teacher (distill.teacher), or the folder "
                "that has its cache (distill.cache)"
            )
        with atomic_write(file) as temporary:
            values = {"format": FORMAT, **asdict(identity)}
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    found = _read_identity(file)
    if identity is not None and (
        differences := [
            f"{each.name} = {getattr(found, each.name)!r} there, {getattr(identity, each.name)!r} here"
            for each in fields(CacheIdentity)
            if getattr(found, each.name) != getattr(identity, each.name)
        ]
    ):
        raise CacheError(
            f"{directory}: is another teacher's cache ({'; '.join(differences)}); choose another "
            "distill.cache"
        )
    return TeacherCache(directory, found)


def has_cache(directory: Path) -> bool:
    """Whether there is one. Raises CacheError for a file, and for a folder with something else in it."""
    if directory.is_file():
        raise CacheError(f"{directory}: is a file; choose another distill.cache")
    if (directory / "cache.json").is_file():
        return True
    if directory.is_dir() and any(".tmp-" not in path.name for path in directory.iterdir()):
        raise CacheError(
            f"{directory}: holds something else than a teacher's cache; choose another distill.cache"
        )
    return False


def place_bytes(vocab_size: int, top_k: int) -> int:
    """Bytes of one place in a cache."""
    return top_k * ids_dtype(vocab_size).itemsize + 2 * (top_k + 1)


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest that holds every id; int32 rather than uint32, which torch hardly knows."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _read_identity(file: Path) -> CacheIdentity:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if (stated := values.pop("format")) != FORMAT:
            raise CacheError(f"{file}: format {stated!r} is not {FORMAT!r}; choose another distill.cache")
        identity = CacheIdentity(**values)
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"{file}: not the description of a teacher's cache ({error}); choose another distill.cache"
        ) from None
    wanted = {"str": str, "int": int, "float": float}
    if any(
        type(getattr(identity, each.name)) is not wanted[str(each.type)] for each in fields(CacheIdentity)
    ):
        raise CacheError(f"{file}: has values of wrong types; choose another distill.cache")
    return identity


def _digest(key: bytes, ids: Ids, logs: NDArray[np.float16]) -> bytes:
    digest = hashlib.sha256(key)
    digest.update(np.ascontiguousarray(ids).data)
    digest.update(np.ascontiguousarray(logs).data)
    return digest.digest()


def _damaged(file: Path, reason: str) -> CacheError:
    return CacheError(
        f"{file}: damaged ({reason}); delete this file: the teacher then runs again over what it held"
    )
