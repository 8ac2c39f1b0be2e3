"""rejected.jsonl: what was left out of a folder of shards, one JSON object a line, and counts by reason."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

REJECTED = "rejected.jsonl"


class Rejected:
    """Lists what was left out in DIRECTORY/rejected.jsonl and counts it. A context manager."""

    def __init__(self, directory: Path, reasons: Iterable[str]) -> None:
        self.counts = dict.fromkeys(reasons, 0)
        self._stream = (directory / REJECTED).open("w", encoding="utf-8")

    def add(self, name: str, reason: str) -> None:
        self.counts[reason] += 1
        self._stream.write(json.dumps({"reason": reason, "name": name}) + "\n")

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.items() if count) or "none"

    def __enter__(self) -> Rejected:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
