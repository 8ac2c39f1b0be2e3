"""The GGUF container (version 3), read as if its maker were hostile: metadata, and tensors as mapped bytes.

    "GGUF", version u32, number of tensors u64, number of metadata pairs u64
    pairs      key, type u32, value              (strings: length u64 and UTF-8 bytes; arrays: type, count)
    tensors    name, dimensions u32, sizes u64 (fastest first), type u32, offset u64 into the data
    data       aligned to general.alignment (32), every tensor by itself

Every count, length and offset is compared with what the file can hold before anything is allocated or read.
Layout: the GGUF specification of ggml-org/ggml (docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.gguf_blocks import TYPES, BlockType
from mobilellm.texts import LENGTH_BYTES, Texts

_MAGIC = b"GGUF"
_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 64  # as in ggml
_LONGEST_KEY = 65_535
_LONGEST_SHOWN = 80
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_HASHED_AT_ONCE = 2**24
_SMALLEST_PAIR, _SMALLEST_TENSOR = 13, 32
"""Bytes that a metadata pair and a tensor's description take at least."""


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """As in PyTorch: the last dimension is the one that lies together in memory."""
    type: BlockType
    offset: int
    """Of the first byte in the file."""

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.shape)


@dataclass(frozen=True)
class GGUF:
    """A file that is open: its metadata, and its tensors by name. The bytes are read when they are used."""

    path: Path
    metadata: dict[str, Any]
    """Numbers and texts as Python's own, arrays of numbers as numpy's, arrays of texts as Texts."""
    tensors: dict[str, TensorInfo]
    data: NDArray[np.uint8]
    """The whole file, mapped."""

    def __repr__(self) -> str:
        return f"<GGUF {str(self.path)!r}: {len(self.tensors)} tensors, {len(self.data):,} bytes>"

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of the tensors of each type, the type with most first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, in hexadecimal: about a second a gigabyte."""
        import hashlib  # here, as everywhere on the way to a first token: OpenSSL takes 4 MB

        digest = hashlib.sha256()
        for start in range(0, len(self.data), _HASHED_AT_ONCE):
            digest.update(self.data[start : start + _HASHED_AT_ONCE].data)
            self.let_go(start, _HASHED_AT_ONCE)
        return digest.hexdigest()

    def let_go(self, start: int, length: int) -> None:
        """Let the system drop bytes of the map from this process's memory. They can be read again."""
        base: Any = self.data.base
        mapped: Any = getattr(base, "obj", base)  # numpy holds the map by way of a memoryview
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None or not isinstance(mapped, mmap.mmap):
            return
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(start + length, len(self.data)) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            mapped.madvise(advice, first, length)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor as they lie in the file."""
        info = self.tensors[name]
        return self.data[info.offset : info.offset + info.nbytes]

    def array(self, name: str) -> NDArray[np.float32]:
        """A tensor's values in float32."""
        info = self.tensors[name]
        return info.type.decode(self.raw(name), info.shape)


def read_gguf(path: str | Path) -> GGUF:
    """Open a file. Raises FileNotFoundError, or ValueError with one line naming file, fault and place."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name a .gguf file")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ValueError(f"{path}: is no GGUF file ({size} bytes)")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(path, mapped, size)
    if (magic := reader.take(4)) != _MAGIC:
        raise ValueError(f"{path}: is no GGUF file: it begins with {magic!r}")
    version = reader.number("<I")
    if version != _VERSION:
        raise ValueError(
            f"{path}: is GGUF version {version}; only version {_VERSION} is read, convert it anew"
        )
    num_tensors, num_pairs = reader.number("<Q"), reader.number("<Q")
    reader.expect_room(num_tensors, _SMALLEST_TENSOR, "tensors")
    reader.expect_room(num_pairs, _SMALLEST_PAIR, "metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = reader.text("a metadata key")
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"{path}: a metadata key has {len(key):,} characters, of 65,535 at most")
        if key in metadata:
            raise ValueError(f"{path}: the metadata key {shown(key)} is there twice")
        metadata[key] = reader.value(reader.number("<I"), key)
    described = [reader.tensor() for _ in range(num_tensors)]
    tensors = _placed(path, described, _data_start(path, metadata, reader.place), size)
    return GGUF(path, metadata, tensors, np.frombuffer(mapped, dtype=np.uint8))


def shown(value: Any) -> str:
    """A value of a file in a few words of one line, whatever it is."""
    if isinstance(value, Texts | np.ndarray):
        return f"an array of {len(value):,}"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


class _Reader:
    """A place in the file that moves on; nothing is read beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self.place = 0

    def take(self, count: int) -> bytes:
        self.expect_room(count, 1, "bytes")
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, what: str) -> str:
        where = self.place
        data = self.take(self.number("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self._path}: {what} at byte {where} is no UTF-8 text") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"the value of {shown(key)}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise ValueError(
                f"{self._path}: the value of {shown(key)} has type {kind}, which GGUF does not know"
            )
        number = self.number(_NUMBERS[kind])
        return bool(number) if kind == _BOOL else number

    def _array(self, key: str) -> Any:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self.expect_room(count, 8, f"texts in {shown(key)}")
            return self._texts(count, f"a text of {shown(key)}")
        if kind not in _NUMBERS:
            raise ValueError(f"{self._path}: {shown(key)} is an array of type {kind}, which is not read")
        layout = np.dtype(_NUMBERS[kind])
        self.expect_room(count, layout.itemsize, f"numbers in {shown(key)}")
        numbers = np.frombuffer(self.take(count * layout.itemsize), dtype=layout)
        return numbers.astype(bool) if kind == _BOOL else numbers

    def _texts(self, count: int, what: str) -> Texts:
        """As `text` for each of `count`, in a fraction of the time: a vocabulary has tens of thousands."""
        first, data, length_at = self.place, self._data, struct.Struct("<Q").unpack_from
        bounds, place, last = array("q", [0]), self.place, self._size - LENGTH_BYTES
        for _ in range(count):
            length = length_at(data, place)[0] if place <= last else self._size
            if length > last - place:
                self.place = place
                self.text(what)  # which says what is wrong
            place += LENGTH_BYTES + length
            bounds.append(place - first)
        self.place = place
        texts = Texts(data[first:place], bounds)
        if not texts.are_utf8():
            self.place = first
            for _ in range(count):
                self.text(what)
        return texts

    def tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self.text("a tensor's name")
        if not 0 < len(name.encode()) < _LONGEST_NAME:
            raise ValueError(f"{self._path}: a tensor's name has {len(name.encode())} bytes, of 1 … 63")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{self._path}: tensor {name!r} has {dimensions} dimensions, of 1 … 4")
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        number, offset = self.number("<I"), self.number("<Q")
        known = next((each for each in TYPES.values() if each.number == number), None)
        if known is None:
            raise ValueError(
                f"{self._path}: tensor {name!r} has type {number}, which is not read; known are "
                f"{', '.join(TYPES)}"
            )
        if min(shape) < 1 or shape[-1] % known.block:
            raise ValueError(
                f"{self._path}: tensor {name!r} has shape {list(shape)}; rows of {known.name} are multiples "
                f"of {known.block}"
            )
        return name, shape, known, offset

    def expect_room(self, count: int, each: int, what: str) -> None:
        if count * each > self._size - self.place:
            raise ValueError(
                f"{self._path}: is cut off or damaged: {count:,} {what} at byte {self.place:,} do not fit "
                f"its {self._size:,} bytes; fetch it again"
            )


def _data_start(path: Path, metadata: dict[str, Any], end_of_header: int) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment = {shown(alignment)} is no power of two up to 2^20")
    return -(-end_of_header // alignment) * alignment


def _placed(
    path: Path, described: list[tuple[str, tuple[int, ...], BlockType, int]], start: int, size: int
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise ValueError(f"{path}: the tensor {name!r} is there twice")
        info = TensorInfo(name, shape, kind, start + offset)
        if info.offset + info.nbytes > size:
            raise ValueError(
                f"{path}: is cut off or damaged: tensor {name!r} ends at byte {info.offset + info.nbytes:,} "
                f"of {size:,}; fetch it again"
            )
        tensors[name] = info
    end = 0
    for info in sorted(tensors.values(), key=lambda each: each.offset):
        if info.offset < end:
            raise ValueError(f"{path}: the tensor {info.name!r} overlaps another one")
        end = info.offset + info.nbytes
    return tensors
