"""The record of a run: one JSON object a line, kept consistent with the checkpoint a run resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write

Record = dict[str, Any]


class MetricsLog:
    """Appends records to a JSONL file. Opening it at step N drops what was logged after step N.

    A run that starts afresh opens it at -1, which drops everything. Only one process may write at a time.
    """

    def __init__(self, file: Path, step: int) -> None:
        for remains in file.parent.glob(f"{file.name}.tmp-*"):  # of a process that was killed here
            remains.unlink()
        kept = [record for record in read_metrics(file) if record["step"] <= step] if step >= 0 else []
        with atomic_write(file) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._stream = file.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """To the disk: a checkpoint must not outlive the records before it."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(file: Path) -> list[Record]:
    """All records of a run; none if there is no file. What a crash cut short at the end is left out.

    Raises ValueError naming file and line for damage with whole records after it.
    """
    return list(stream_metrics(file))


def stream_metrics(file: Path) -> Iterator[Record]:
    """As `read_metrics`, a record at a time: a run of a million steps needs no gigabyte."""
    if not file.is_file():
        return
    damaged = 0
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            record = _record(line)
            if record is None:
                damaged = damaged or number
            elif damaged:
                raise ValueError(f"{file}: line {damaged} is damaged; correct it or delete it")
            else:
                yield record


def _record(line: str) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None
