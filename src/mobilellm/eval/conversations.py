"""Conversations to evaluate on: a file of them, or the part of it that fine-tuning held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobilellm.data.chat import Skip, read_talks
from mobilellm.data.conversation_shapes import Talk
from mobilellm.data.holding_out import digest_of, held_out_below


@dataclass(frozen=True)
class Conversations:
    name: str
    """Of the file, for results."""
    talks: list[Talk]
    skipped: dict[str, int]
    """Records of the file that hold no conversation, by reason."""

    @property
    def sha256(self) -> str:
        """Of what is asked: two records with the same one can be compared conversation by conversation."""
        return hashlib.sha256(_written(self.talks).encode()).hexdigest()


def read_conversations(path: Path, held_out: float | None = None, limit: int | None = None) -> Conversations:
    """The first `limit` conversations of a file, of those that training with `held_out` does not see.

    `held_out` is the share that fine-tuning was told to hold out: by the hash of each conversation, so no
    list of them has to be kept. Raises FileNotFoundError, ValueError naming the file for what cannot be read,
    where no conversation is left, or where `held_out` or `limit` makes no sense.
    """
    if held_out is not None and not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out} must lie between 0 and 1, the share that was held out")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit} must be at least 1")
    found = [each.talk for each in read_talks([path])]
    skipped = Counter(each.reason for each in found if isinstance(each, Skip))
    talks = [each for each in found if isinstance(each, Talk)]
    if not talks:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "empty"
        raise ValueError(f"{path}: holds no conversation ({reasons})")
    if held_out is not None:
        digests = np.array([digest_of(_written(talk)) for talk in talks], dtype=np.uint64)
        chosen = (
            held_out_below(digests, held_out)
            if held_out_below(digests, held_out).any()
            else digests == digests.min()
        )
        talks = [talk for talk, is_held_out in zip(talks, chosen, strict=True) if is_held_out]
    return Conversations(path.name, talks[:limit], dict(skipped))


def _written(talks: Sequence[object]) -> str:
    return json.dumps(list(talks), sort_keys=True)
