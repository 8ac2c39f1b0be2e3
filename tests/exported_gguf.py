"""A .gguf file of a model directory, as the tests of what runs it want it: made at once, compared with nothing."""

from __future__ import annotations

from pathlib import Path

from mobilellm.export.source import open_source
from mobilellm.export.targets import Options
from mobilellm.export.to_gguf import TARGET


def export_gguf(
    source: str | Path,
    path: str | Path,
    kind: str | None = None,
    embedding_kind: str | None = None,
    unroll: bool = False,
) -> list[str]:
    """What `mobilellm export` does first. Returns notes, one line each."""
    opened = open_source(source, lambda notice: None)
    options = TARGET.complete(Options(kind, embedding_kind, unroll=unroll), opened)
    return TARGET.write(opened, Path(path), options)
