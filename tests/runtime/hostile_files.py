"""Files that a hostile maker could have made of a valid one, and what using one may lead to.

As a program it uses many, one after the other, in little memory: `hostile_files.py FIRST COUNT FOLDER FILE...`.
The file in use lies in FOLDER, so that it can be looked at when the process dies of it.
"""

from __future__ import annotations

import random
import resource
import signal
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm import gguf_tokenizer
from mobilellm.gguf import read_gguf
from mobilellm.runtime.engine import NativeModel
from mobilellm.texts import Texts

ROOM = 2**28
"""Bytes of memory that using a file of less than a megabyte may take beside what Python has."""
LONGEST_SECONDS = 10
_KINDS = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7,
          "uint64": 10, "int64": 11, "float64": 12}  # fmt: skip
NUMBERS = (
    0,
    1,
    2,
    3,
    31,
    32,
    33,
    64,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS, -1, 0.0, 1e-30, 1e30, float("nan"), float("inf"), True, "", "llama", "mobilellm", "none", "reverse",
    "x\n" * 200, [], [""], ["a", "a"], ["x" * 5000] * 3, np.arange(3), np.zeros(300, np.float32), np.ones(2, bool),
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """A file taken apart: values by key, (name, sizes, type, offset) of the tensors, and their bytes."""

    metadata: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], int, int]]
    data: bytes

    @classmethod
    def of(cls, path: Path) -> Parts:
        file = read_gguf(path)
        start = min(info.offset for info in file.tensors.values())
        tensors = [
            (info.name, tuple(reversed(info.shape)), info.type.number, info.offset - start)
            for info in file.tensors.values()
        ]
        metadata = {
            key: list(value) if isinstance(value, Texts) else value for key, value in file.metadata.items()
        }
        return cls(metadata, tensors, file.data[start:].tobytes())

    def together(self) -> bytes:
        pairs = b"".join(_text(key) + _value(value) for key, value in self.metadata.items())
        described = b"".join(
            _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
            for name, sizes, kind, offset in self.tensors
        )
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata)) + pairs + described
        return head + bytes(-len(head) % 32) + self.data


def hostile(parts: Parts, case: int) -> bytes:
    """The file of this number: values, tensors or bytes of a valid one changed, or its end cut off."""
    chance = random.Random(case)
    how = chance.random()
    if how < 0.5:
        parts = _other_values(parts, chance)
    if 0.4 < how < 0.6:
        parts = _other_tensors(parts, chance)
    whole = bytearray(parts.together())
    if how > 0.45:
        _change_bytes(whole, len(whole) - len(parts.data), chance)
    if chance.random() < 0.15:
        del whole[chance.randrange(len(whole)) :]
    return bytes(whole)


def use(path: Path) -> bool:
    """Read a file, and run one token where it is accepted: whether it was. A refusal must be one line."""
    try:
        file = read_gguf(path)
        gguf_tokenizer.read_tokenizer(file)
        gguf_tokenizer.read_chat_template(file)
        model = NativeModel(file, 1)
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"{path}: "), text[:300]
        assert "\n" not in text, text[:300]
        assert len(text) < 1000, text[:300]
        return False
    model.logits(model.forward(np.array([1]), model.new_cache(1)))
    model.close()
    return True


def _other_values(parts: Parts, chance: random.Random) -> Parts:
    metadata = dict(parts.metadata)
    for _ in range(chance.randint(1, 3)):
        key = chance.choice(list(metadata))
        if chance.random() < 0.15:
            del metadata[key]
        else:
            metadata[key] = chance.choice(VALUES)
    if chance.random() < 0.1:
        metadata[chance.choice(("llama.rope.scaling.type", "x" * 70_000, "general.alignment"))] = (
            chance.choice(VALUES)
        )
    return replace(parts, metadata=metadata)


def _other_tensors(parts: Parts, chance: random.Random) -> Parts:
    tensors = list(parts.tensors)
    at = chance.randrange(len(tensors))
    name, sizes, kind, offset = tensors[at]
    match chance.randrange(6):
        case 0:
            del tensors[at]
        case 1:
            tensors.append((chance.choice((name, "other", "output.weight", "x" * 80)), sizes, kind, offset))
        case 2:
            sizes = tuple(chance.choice(NUMBERS) for _ in range(chance.randint(0, 5)))
            tensors[at] = (name, sizes, kind, offset)
        case 3:
            tensors[at] = (name, sizes, chance.choice((0, 1, 2, 3, 8, 30, 99, 2**32 - 1)), offset)
        case 4:
            tensors[at] = (name, sizes, kind, chance.choice((*NUMBERS, offset + 1)))
        case _:
            other = chance.randrange(len(tensors))
            tensors[at], tensors[other] = (tensors[other][0], *tensors[at][1:]), (name, *tensors[other][1:])
    return replace(parts, tensors=tensors)


def _change_bytes(whole: bytearray, head: int, chance: random.Random) -> None:
    end = head if chance.random() < 0.8 else len(whole)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(end - 8)
        match chance.randrange(5):
            case 0:
                whole[at] = chance.randrange(256)
            case 1:
                whole[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) % 2**32)
            case 2:
                whole[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
            case 3:
                del whole[at : at + chance.randint(1, 40)]
                end = min(end, len(whole))
            case _:
                whole[at:at] = chance.randbytes(chance.randint(1, 40))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, _KINDS[value.dtype.name], len(value)) + value.tobytes()
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    layout, kind = ("<Ii", 5) if value < 0 else ("<II", 4) if value < 2**32 else ("<IQ", 10)
    return struct.pack(layout, kind, value)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def main(first: int, count: int, folder: Path, files: list[Path]) -> None:
    valid = [Parts.of(file) for file in files]
    path, accepted = folder / "hostile.gguf", 0
    path.write_bytes(valid[0].together())
    assert use(path)  # and all libraries are loaded
    room = _address_space() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for case in range(first, first + count):
        path.write_bytes(hostile(valid[case % len(valid)], case))
        signal.alarm(LONGEST_SECONDS)  # which ends the process
        try:
            accepted += use(path)
        except BaseException:
            print(f"case {case}", file=sys.stderr)
            raise
    signal.alarm(0)
    print(f"{count} cases, {accepted} accepted")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
