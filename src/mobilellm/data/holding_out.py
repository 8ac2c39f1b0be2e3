"""Which side of the split a text stands on: it depends on the text alone, not on its neighbours."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray


def check_share(held_out: float) -> None:
    """Raises ValueError unless `held_out` is a share below 1; 0 holds nothing out."""
    if not 0 <= held_out < 1:
        raise ValueError(
            f"held_out = {held_out} must be 0 or above and below 1; it is a share of the documents"
        )


def digest_of(text: str) -> int:
    """The first eight bytes of the sha256 of its UTF-8 bytes, big-endian."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out_below(digests: NDArray[np.uint64], held_out: float) -> NDArray[np.bool_]:
    """Which texts are held out: what a smaller share holds out, a larger one does too."""
    return digests < np.uint64(math.ceil(held_out * 2**64))
