"""rejected.jsonl: what was left out of a folder of shards, one JSON object a line, and counts by reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

REJECTED = "rejected.jsonl"

EXCERPT = 80
"""Characters of a rejected text that are told."""


def line_of(file: str, place: Mapping[str, int | str], reason: str, text: str) -> str:
    """`place` is where in the file, by the name of what is counted there; of `text` the head is kept."""
    return json.dumps({"file": file, **place, "reason": reason, "text": text[:EXCERPT]}) + "\n"


class Rejected:
    """Lists what was left out in DIRECTORY/rejected.jsonl and counts it. A context manager."""

    def __init__(self, directory: Path) -> None:
        self.counts: dict[str, int] = {}
        self._stream = (directory / REJECTED).open("w", encoding="utf-8")

    def add(self, file: str, place: Mapping[str, int | str], reason: str, text: str) -> None:
        """As `line_of`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self._stream.write(line_of(file, place, reason, text))

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.items()) or "none"

    def __enter__(self) -> Rejected:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
