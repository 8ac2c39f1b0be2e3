"""What the tests of the tokenizer share: texts, the sentencepiece library as oracle, and a model writer."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import strategies as st

import mobilellm
from mobilellm.sentencepiece_model import BYTE_PIECES, SPECIAL_PIECES
from mobilellm.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces in a tokenizer.model."""

HARD_TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n \n",
    " leading",
    "   leading and trailing   ",
    "\t\ttabs\tand \t spaces",
    "def f(x):\n    if x:\n        return  x\n",
    "a\x00b\x01\x7f\x85",
    "🙂👩\u200d👩\u200d👧🏽 🇫🇮",
    "e\u0301a\u0308 \u1e9b\u0323 ﬁ Å \u212b",
    "中文 日本語 한국어 русский العربية हिन्दी",
    "a </s> b <s> c <unk> <0x41> </s>",
    "▁ ▁▁ a▁b ▁ c",
    "\ufeff\u200b\u00a0\u2028 \ufffd\uffff\U0010ffff",
    "======== ==== === --- /////// ....... ,,,,",
    "0123456789 1,000,000.00",
    "it 's a pity , is n't it ? yes !",
    *(" " * length + word for length in (3, 7, 15, 16, 17, 31, 33, 100) for word in ("", "the", "\n", "1")),
]
NASTY = [
    " ",
    "  ",
    "     ",
    "\n",
    "\t",
    "▁",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<",
    "e\u0301",
    "\x00",
    "é",
    "中",
]
NASTY += ["🙂", "the", " the", "then", " a", "in", "ing", "==", "=", "-", "--", "1", "12", "\u200d", "\u00a0"]
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(NASTY)).map("".join),
    st.text(alphabet=" etainosr=-\n"),
)
"""Characters that meet in merges, in bytes, at spaces and in what looks like special pieces."""


@cache
def own_text() -> str:
    """Text that is always there: sources of the package. English, code, indentation, a few odd signs."""
    names = ("sentencepiece_model", "text_stream", "tokenizer", "tokenizer_files", "tokenizer_training")
    folder = Path(mobilellm.__file__).parent
    return "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)


@cache
def trained() -> Tokenizer:
    """A tokenizer of 700 pieces, made by us."""
    return Tokenizer.train([own_text()], 700)


@cache
def small_model() -> Path:
    """A tokenizer.model that sentencepiece trained, of the kind that can be read."""
    return stored(sentencepiece_model())


@cache
def small() -> Tokenizer:
    """`small_model` as we read it."""
    return Tokenizer.from_sentencepiece(small_model())


def sentencepiece_model(**changes: Any) -> bytes:
    """A tokenizer.model trained by sentencepiece, in the Llama way but for the `changes`."""
    arguments: dict[str, Any] = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
    }
    model, lines = io.BytesIO(), iter(own_text().splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **(arguments | changes)
    )
    return model.getvalue()


@cache
def stored(model: bytes) -> Path:
    """A file with these bytes, kept for the session."""
    path = Path(folder().name) / f"{len(list(Path(folder().name).iterdir()))}.model"
    path.write_bytes(model)
    return path


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def oracle(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def model_bytes(ordinary: Iterable[tuple[str, float, int]]) -> bytes:
    """A tokenizer.model with the usual first 259 pieces and these (piece, score, type) after them."""
    head = [(piece, 0.0, UNKNOWN if piece == "<unk>" else CONTROL) for piece in SPECIAL_PIECES]
    head += [(piece, 0.0, BYTE) for piece in BYTE_PIECES]
    entries = b""
    for piece, score, kind in [*head, *ordinary]:
        entries += field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind))
    trainer = field(3, 2) + field(35, 1)  # bpe, byte_fallback
    normaliser = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)
    return entries + field(2, trainer) + field(3, normaliser)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def run_python(script: str, environment: dict[str, str], *arguments: str, input: str = "") -> str:
    """Standard output of a fresh interpreter with these additions to its environment."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, input=input, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
