"""The record of a run: one JSON object a line, kept consistent with the checkpoint a run resumes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write

Record = dict[str, Any]


class MetricsLog:
    """Appends records to a JSONL file. Opening it at step N drops what was logged after step N."""

    def __init__(self, file: Path, step: int) -> None:
        kept = [record for record in read_metrics(file) if record["step"] <= step]
        with atomic_write(file) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._stream = file.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(file: Path) -> list[Record]:
    """All whole lines; a last line cut short by a crash is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
