"""One way into every kind of source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mobilellm.data.chunks import CHUNK_BYTES, Chunk, Place, text_chunks
from mobilellm.data.inputs import Source
from mobilellm.data.prepare_settings import PrepareSettings
from mobilellm.data.tables import hub_chunks, parquet_chunks


def chunks_of(
    source: Source,
    place: Place,
    settings: PrepareSettings,
    size: int = CHUNK_BYTES,
    scratch: Path | None = None,
    seen: str = "",
) -> Iterator[Chunk]:
    """Chunks of `source` from `place` on. `scratch` and `seen` as for parquet files and standard input."""
    field = settings.text_field
    if source.format == "hub":
        return hub_chunks(source, place, field, settings.hub_config, settings.hub_split, size)
    if source.format == "parquet":
        return parquet_chunks(source, place, field, size, scratch)
    return text_chunks(source, place, settings.cutting, size, seen)
