"""Files in blocks of bytes, whatever they are packed with; their first bytes tell, not their names."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

SUFFIXES = (".gz", ".xz", ".bz2", ".zst")

_HEAD = 6
_PACKED_BLOCK = 2**16  # small, because it may unpack to a thousand times its size
_PLAIN_BLOCK = 2**20


class DamagedFileError(ValueError):
    """A packed file that ends early or holds something else; what came before is good."""


class Blocks:
    """Iterates over the unpacked content of a file. `position` counts the bytes read of the file itself.

    Iterating raises DamagedFileError where the content does not go on, and OSError where the disk fails.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.position = 0
        self._head = b""
        while len(self._head) < _HEAD and (more := stream.read(_HEAD - len(self._head))):
            self._head += more  # a pipe may give them one by one
        self._make = _unpacker(self._head)

    def __iter__(self) -> Iterator[bytes]:
        return self._plain() if self._make is None else self._unpacked(self._make)

    def skip(self, size: int) -> Iterator[bytes]:
        """Iterate from byte `size` of the content on: at once if it is not packed and the file can seek."""
        if self._make is None and self._stream.seekable():
            self._stream.seek(size)
            self._head, self.position = b"", size
            yield from self._plain()
            return
        for block in self:
            if size < len(block):
                yield block[size:]
            size = max(0, size - len(block))

    @property
    def packed(self) -> bool:
        return self._make is not None

    def _read(self, size: int) -> bytes:
        data, self._head = self._head, b""
        data += self._stream.read(size - len(data))
        self.position += len(data)
        return data

    def _plain(self) -> Iterator[bytes]:
        while block := self._read(_PLAIN_BLOCK):
            yield block

    def _unpacked(self, make: Callable[[], _Unpacker]) -> Iterator[bytes]:
        unpacker, fresh = make(), True
        data = self._read(_PACKED_BLOCK)
        while data:
            try:
                block = unpacker.decompress(data)
            except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
                raise DamagedFileError(f"damaged ({error})") from None
            except Exception as error:  # zstandard's own, which is no subclass of anything above
                if type(error).__name__ != "ZstdError":
                    raise
                raise DamagedFileError(f"damaged ({error})") from None
            if block:
                yield block
            data, fresh = b"", False
            if unpacker.eof:  # several packed files may stand one after the other, zeros between them
                data = unpacker.unused_data.lstrip(b"\0")
                unpacker, fresh = make(), True
            if not data:
                data = self._read(_PACKED_BLOCK)
                if fresh:
                    data = data.lstrip(b"\0") or data[:0]
        if not fresh:
            raise DamagedFileError("damaged (it ends early)")


class _Unpacker(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


def open_blocks(path: Path) -> tuple[BinaryIO, Blocks]:
    """The file, to be closed by the caller, and its content."""
    stream = path.open("rb")
    try:
        return stream, Blocks(stream)
    except BaseException:
        stream.close()
        raise


def _unpacker(head: bytes) -> Callable[[], _Unpacker] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return _zstandard()  # the second is a frame to be skipped, which pzstd puts in front
    return None


def _zstandard() -> Callable[[], _Unpacker]:
    import zstandard

    make: Any = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    return make  # type: ignore[no-any-return]
