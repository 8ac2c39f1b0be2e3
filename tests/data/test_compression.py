"""Every kind of packing gives back what was packed, and says so when it cannot."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data.compression import Blocks, DamagedFileError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
PACKED = [name for name in PACKERS if name != "plain"]
CONTENT = b"".join(b"%d lines of text\n" % (i * i) for i in range(20_000))
ALL_PACKED = {name: pack(CONTENT) for name, pack in PACKERS.items()}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize(
    "content", [b"", b"x", b"\0" * 10, b"BZ", CONTENT], ids=["", "x", "zeros", "BZ", "much"]
)
def test_what_was_packed_comes_out(name: str, content: bytes) -> None:
    packed = PACKERS[name](content)
    blocks = Blocks(io.BytesIO(packed))
    assert b"".join(blocks) == content
    assert blocks.position == len(packed)
    assert blocks.packed == (name != "plain")


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(PACKERS)), st.integers(0, len(CONTENT) + 5))
def test_from_a_place_on(name: str, offset: int) -> None:
    assert b"".join(Blocks(io.BytesIO(ALL_PACKED[name])).skip(offset)) == CONTENT[offset:]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("between", [0, 4, 70_000])
def test_several_in_one_file(name: str, between: int) -> None:
    packed = ALL_PACKED[name]
    data = packed + b"\0" * between + packed + b"\0" * between
    assert b"".join(Blocks(io.BytesIO(data))) == CONTENT * 2


def test_zstandard_behind_a_frame_that_is_skipped() -> None:
    """As pzstd writes files: in front of each part stands a frame that tells its size."""
    frame = struct.pack("<III", 0x184D2A50, 4, 0)
    data = frame + ALL_PACKED["zst"] + struct.pack("<II", 0x184D2A5F, 0) + ALL_PACKED["zst"]
    assert b"".join(Blocks(io.BytesIO(data))) == CONTENT * 2


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("damage", ["end", "half", "middle", "more"])
def test_damage_is_told_after_what_is_good(name: str, damage: str) -> None:
    packed = ALL_PACKED[name]
    middle = len(packed) // 2
    damaged = {
        "end": packed[:-3],
        "half": packed[:middle],
        "middle": packed[:middle]
        + bytes(byte ^ 0xFF for byte in packed[middle : middle + 20])
        + packed[middle + 20 :],
        "more": packed + b"garbage",
    }[damage]
    found = b""
    with pytest.raises(DamagedFileError, match="damaged"):
        for block in Blocks(io.BytesIO(damaged)):
            found += block
    if damage != "middle":  # where a checksum comes only at the end
        assert CONTENT.startswith(found)
    assert damage != "more" or found == CONTENT
