"""Which side of the split a text stands on: it depends on the text alone, not on its neighbours."""

from __future__ import annotations

import hashlib

from mobilellm.data.shard_index import SPLITS


def check_share(held_out: float) -> None:
    """Raises ValueError unless `held_out` is a share below 1; 0 holds nothing out."""
    if not 0 <= held_out < 1:
        raise ValueError(
            f"held_out = {held_out} must be 0 or above and below 1; it is a share of the documents"
        )


def digest_of(text: str) -> bytes:
    """SHA-256 of its UTF-8 bytes. Raises UnicodeEncodeError for lone surrogates."""
    return hashlib.sha256(text.encode()).digest()


def side_of(digest: bytes, held_out: float) -> str:
    """ "train" or "held-out": the hash lies below the share, so a smaller share is part of a larger one."""
    return SPLITS[int.from_bytes(digest[:8], "big") < held_out * 2**64]
