"""The texts `quantize` reads: the user's files, else the documentation that every Python carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from mobilellm.data.documents import python_documentation, text_files

_HELD_OUT = 10
"""Of its language reference every tenth topic is compared on, and the others are there to calibrate on."""


def evaluation_texts(files: Sequence[Path], say: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """(names, texts) to compare on. Raises FileNotFoundError or ValueError naming the file."""
    if files:
        return _read(files)
    say("compared on a tenth of Python's language reference; --eval-data names your own text")
    return ["Python's language reference, every tenth topic"], [_documentation(held_out=True)]


def calibration_texts(files: Sequence[Path], say: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """(names, texts) to calibrate on."""
    if files:
        return _read(files)
    say("calibrated on Python's language reference; --calibration names text like what your model will read")
    return ["Python's language reference, nine of ten topics"], [_documentation(held_out=False)]


def _read(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    documents = list(text_files(files))
    return [document.name for document in documents], [document.text for document in documents]


def _documentation(held_out: bool) -> str:
    """Of the language reference, which comes first: docstrings take seconds to collect."""
    topics = takewhile(lambda document: document.name.startswith("pydoc:"), python_documentation())
    return "\n\n".join(
        document.text for number, document in enumerate(topics) if (number % _HELD_OUT == 0) == held_out
    )
