"""Reading a Llama-style SentencePiece `tokenizer.model` without the sentencepiece and protobuf libraries.

The file is one protobuf message, `ModelProto` of sentencepiece_model.proto: repeated pieces (field 1), the
trainer's settings (2), the normaliser (3) and the denormaliser (5). Only models that can be reproduced token
for token are accepted; everything else is refused with one line that says what is different.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from mobilellm.git_lfs import pointer_problem

SPECIAL_PIECES = ("<unk>", "<s>", "</s>")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LAYOUT_HEAD = SPECIAL_PIECES + BYTE_PIECES
"""The first 259 pieces of every Llama-style vocabulary."""
SPACE = "\u2581"
"""What a space is in a piece: LOWER ONE EIGHTH BLOCK."""

_BPE = 2  # TrainerSpec.ModelType
_MODEL_TYPES = {1: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
_PIECE_TYPES = {
    _NORMAL: "normal",
    _UNKNOWN: "unknown",
    _CONTROL: "control",
    4: "user-defined",
    5: "unused",
    _BYTE: "byte",
}
_HEAD_TYPES = (_UNKNOWN, _CONTROL, _CONTROL) + (_BYTE,) * len(BYTE_PIECES)

# (wire type, value): an int for wire type 0, the raw bytes for the others.
_Field = tuple[int, int | bytes]


class SentencePieceModel(NamedTuple):
    pieces: tuple[str, ...]
    """In id order; `LAYOUT_HEAD` first, the rest are ordinary pieces."""
    ranked: tuple[str, ...]
    """The pieces of two or more characters, the one that is merged first before the others."""


def read_sentencepiece_model(path: str | Path) -> SentencePieceModel:
    """Raises FileNotFoundError, or ValueError with one line that names the file and what is wrong with it."""
    try:
        if problem := pointer_problem(Path(path)):
            raise ValueError(problem)
        return _parse(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a directory, not a tokenizer.model") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(data: bytes) -> SentencePieceModel:
    entries: list[_Entry] = []
    settings: dict[int, dict[int, _Field]] = {}
    for number, field in _fields(data):
        if number == 1:
            entries.append(_entry(len(entries), field))
        elif number in (2, 3, 5):
            settings[number] = dict(_fields(_bytes(field, f"field {number}")))
    if not entries:
        raise ValueError("not a SentencePiece model: it holds no pieces")
    if 2 not in settings or 3 not in settings:
        raise ValueError(
            "not a whole SentencePiece model: the trainer or normaliser settings are missing (truncated?)"
        )
    _check_settings(trainer=settings[2], normaliser=settings[3], denormaliser=settings.get(5, {}))
    _check_entries(entries)
    return SentencePieceModel(tuple(entry.piece for entry in entries), _ranked(entries))


class _Entry(NamedTuple):
    piece: str
    score: float
    type: int


def _entry(index: int, field: _Field) -> _Entry:
    fields = dict(_fields(_bytes(field, f"piece {index}")))
    try:
        piece = _bytes(fields.get(1, (2, b"")), f"piece {index}").decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"not a SentencePiece model: piece {index} is not UTF-8") from None
    wire, score = fields.get(2, (5, bytes(4)))
    if wire != 5 or not isinstance(score, bytes):
        raise ValueError(f"not a SentencePiece model: the score of piece {index} is not a float")
    return _Entry(piece, struct.unpack("<f", score)[0], _integer(fields, 3, _NORMAL))


def _check_settings(
    trainer: dict[int, _Field], normaliser: dict[int, _Field], denormaliser: dict[int, _Field]
) -> None:
    """Field numbers and defaults are those of TrainerSpec and NormalizerSpec in sentencepiece_model.proto."""
    model_type = _integer(trainer, 3, 1)
    if model_type != _BPE:
        raise ValueError(
            f"is a {_MODEL_TYPES.get(model_type, model_type)} model; only bpe models can be read"
        )
    if not _integer(trainer, 35, 0):
        raise ValueError(
            "has no byte_fallback, so it cannot spell every text; train it with --byte_fallback=true"
        )
    if _integer(trainer, 24, 0):
        raise ValueError("has treat_whitespace_as_suffix=true, which is not supported")
    for name, spec in (("normaliser", normaliser), ("denormaliser", denormaliser)):
        if _bytes(spec.get(2, (2, b"")), name):
            rule = _bytes(spec.get(1, (2, b"")), name).decode("utf-8", "replace")
            raise ValueError(f"has the {name} {rule!r}; only identity is supported")
    if not _integer(normaliser, 3, 1):
        raise ValueError("has add_dummy_prefix=false, which is not supported")
    if _integer(normaliser, 4, 1):
        raise ValueError("has remove_extra_whitespaces=true, which loses text and is not supported")
    if not _integer(normaliser, 5, 1):
        raise ValueError("has escape_whitespaces=false, which is not supported")


def _check_entries(entries: list[_Entry]) -> None:
    for index, (expected, expected_type) in enumerate(zip(LAYOUT_HEAD, _HEAD_TYPES, strict=True)):
        if index >= len(entries) or entries[index][::2] != (expected, expected_type):
            found = f"is {entries[index].piece!r}" if index < len(entries) else "is missing"
            raise ValueError(f"piece {index} {found}; a Llama-style vocabulary has {expected!r} there")
    seen: set[str] = set()
    for index, (piece, score, kind) in enumerate(entries):
        if index >= len(LAYOUT_HEAD) and kind != _NORMAL:
            kind_name = _PIECE_TYPES.get(kind, f"type-{kind}")
            raise ValueError(
                f"piece {index} {piece!r} is {kind_name}; only normal pieces are supported there"
            )
        if not piece or piece in seen:
            raise ValueError(f"piece {index} {piece!r} is {'given twice' if piece else 'empty'}")
        if math.isnan(score):
            raise ValueError(f"piece {index} {piece!r} has no score (NaN)")
        seen.add(piece)
    if SPACE not in seen:
        raise ValueError(f"has no piece {SPACE!r} for a space")
    for entry in entries[len(LAYOUT_HEAD) :]:
        # A character without a piece would be split into bytes before it could be merged.
        missing = next((character for character in entry.piece if character not in seen), None)
        if missing is not None:
            raise ValueError(
                f"piece {entry.piece!r} has the character {missing!r}, which is no piece of its own"
            )


def _ranked(entries: list[_Entry]) -> tuple[str, ...]:
    """Pieces of two or more characters by falling score: the order in which SentencePiece merges.

    Among equal scores SentencePiece merges the leftmost pair, which no fixed order of merges can say, with
    one exception that the Llama vocabulary needs: runs of 2, 3, ... n spaces, all with the same score. There
    leftmost-first means that the run on the left grows until it has n spaces, which is what longest-first
    does, because two spaces are only joined where no longer run can grow.
    """
    merged = sorted(
        (entry for entry in entries[len(LAYOUT_HEAD) :] if len(entry.piece) > 1),
        key=lambda entry: (-entry.score, -len(entry.piece)),
    )
    for score, group in groupby(merged, key=lambda entry: entry.score):
        tied = [entry.piece for entry in group]
        if len(tied) > 1 and tied != [SPACE * length for length in range(len(tied) + 1, 1, -1)]:
            raise ValueError(
                f"pieces {tied[0]!r} and {tied[1]!r} have the same score {score:g}; their order is open"
            )
    return tuple(entry.piece for entry in merged)


def _fields(data: bytes) -> Iterator[tuple[int, _Field]]:
    """The (field number, (wire type, value)) pairs of one message, every read checked against its end."""
    position, end = 0, len(data)
    while position < end:
        start = position
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, (wire, value)
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"not a SentencePiece model: byte {start} begins no protobuf field")
        if number == 0 or length > end - position:
            raise ValueError(f"not a whole SentencePiece model: the field at byte {start} runs past the end")
        yield number, (wire, data[position : position + length])
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("not a whole SentencePiece model: it ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"not a SentencePiece model: no number ends at byte {position}")


def _bytes(field: _Field, name: str) -> bytes:
    if not isinstance(field[1], bytes):
        raise ValueError(f"not a SentencePiece model: {name} is a number")
    return field[1]


def _integer(fields: dict[int, _Field], number: int, default: int) -> int:
    value = fields.get(number, (0, default))[1]
    if not isinstance(value, int):
        raise ValueError(f"not a SentencePiece model: field {number} of the settings is not a number")
    return value
