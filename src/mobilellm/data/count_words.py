"""How many words texts have, as `len(text.split())` counts them, without making the words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ASCII = (*range(0x09, 0x0E), *range(0x1C, 0x21))
_WIDER = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
"""White space by Unicode, beyond ASCII, as `str.isspace` knows it."""


def count_words(texts: Sequence[bytes]) -> NDArray[np.int64]:
    """The number of words in each text, which is given in UTF-8."""
    codes = np.frombuffer(b"\n".join([b"", *texts]), dtype=np.uint8)  # a line break before each
    white = _white_ascii()[codes]
    for lead, following in _wider_by_lead().items():
        places = np.flatnonzero(codes == lead)
        for tail in following:
            if not len(places):
                break
            size = len(tail)
            found = places[places + size < len(codes)]
            for i, code in enumerate(tail, 1):
                found = found[codes[found + i] == code]
            for i in range(size + 1):
                white[found + i] = True
    begins = np.flatnonzero(white[:-1] & ~white[1:])
    offsets = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return np.diff(np.searchsorted(begins, offsets))


def _white_ascii() -> NDArray[np.bool_]:
    table = np.zeros(256, dtype=np.bool_)
    table[list(_ASCII)] = True
    return table


def _wider_by_lead() -> dict[int, list[bytes]]:
    """The later bytes of the wider characters, by their first byte."""
    found: dict[int, list[bytes]] = {}
    for code in _WIDER:
        lead, *tail = chr(code).encode()
        found.setdefault(lead, []).append(bytes(tail))
    return found
