"""Chunks of rows: parquet files, and data sets streamed from the Hub. Needs mobilellm[data]."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mobilellm.data.chunks import CHUNK_BYTES, Chunk, Place
from mobilellm.data.compression import DamagedFileError, open_blocks
from mobilellm.data.inputs import Source
from mobilellm.hub_connection import why_unreachable

_MOST_ROWS = 4096
_BUFFER = 2**20


def parquet_chunks(
    source: Source, place: Place, text_field: str, size: int = CHUNK_BYTES, scratch: Path | None = None
) -> Iterator[Chunk]:
    """Chunks of a parquet file; `place.offset` counts rows.

    Parquet is read from its end, so a packed file is unpacked first, into the folder `scratch`.
    """
    import pyarrow
    import pyarrow.parquet

    row = place.offset
    try:
        with _unpacked(Path(source.name), scratch) as stream:
            # By default it reads all of a row group at once, which may be all of the file.
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
            for chunk in _parquet_chunks(file, source, place, text_field, size):
                yield chunk
                row = chunk.next.offset
    except (DamagedFileError, pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # without a number it is how pyarrow reports pages that it cannot unpack
        line = _first_line(error)
        problem = line if isinstance(error, DamagedFileError) else f"damaged ({line})"
        end = Place(place.source + 1, 0, 1)
        yield Chunk("rows", place.source, [], row, end, source.size or 0, problem)


def _parquet_chunks(file: Any, source: Source, place: Place, text_field: str, size: int) -> Iterator[Chunk]:
    names = tuple(file.schema_arrow.names)
    missing = () if text_field in names else names
    row = 0
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        if row + facts.num_rows <= place.offset:
            row += facts.num_rows
            continue
        a_row = max(1, _text_bytes(facts, text_field) // max(1, facts.num_rows))
        rows = max(1, min(_MOST_ROWS, size // a_row))
        columns = [] if missing else [text_field]
        for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
            first, row = row, row + batch.num_rows
            if row <= place.offset:
                continue
            values = [None] * batch.num_rows if missing else _values(batch.column(0))
            values = values[max(0, place.offset - first) :]
            read = (source.size or 0) * row // max(1, file.metadata.num_rows)
            after = Place(place.source, row, row)
            yield Chunk("rows", place.source, values, row - len(values), after, read, fields=missing)


def _values(column: Any) -> list[Any]:
    """As Python holds them; a text that is no UTF-8, which not every writer checks, as its bytes."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        text = getattr(scalar, "value", scalar)  # of a dictionary, the entry
        return text.as_buffer().to_pybytes() if hasattr(text, "as_buffer") else None


def _text_bytes(group: Any, text_field: str) -> int:
    """Unpacked bytes of a column and what lies below it, in a row group."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.split(".")[0] == text_field
    )


@contextlib.contextmanager
def _unpacked(path: Path, scratch: Path | None) -> Iterator[BinaryIO]:
    stream, blocks = open_blocks(path)
    with stream:
        if not blocks.packed:
            stream.seek(0)
            yield stream
            return
        with tempfile.TemporaryFile(dir=scratch) as copy:
            for block in blocks:
                copy.write(block)
            copy.seek(0)
            yield copy


def hub_chunks(
    source: Source, place: Place, text_field: str, config: str | None, split: str, size: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Chunks of a data set on the Hub, streamed. Raises OSError with one line if it cannot be reached."""
    rows = _stream(source.name, place, config, split)
    values: list[Any] = []
    number, length = place.offset, 0
    missing: tuple[str, ...] = ()
    row: Any
    while (row := _next(rows, source.name)) is not None:
        if text_field not in row and not missing:
            if values:
                yield _hub_chunk(place.source, values, number, ())
                number, values, length = number + len(values), [], 0
            missing = tuple(row)
        value = row.get(text_field)
        values.append(value)
        length += len(value) if isinstance(value, str | bytes) else 1
        if length >= size or len(values) >= _MOST_ROWS:
            yield _hub_chunk(place.source, values, number, missing)
            number, values, length = number + len(values), [], 0
            missing = ()
    if values:
        yield _hub_chunk(place.source, values, number, missing)


def _hub_chunk(source: int, values: list[Any], number: int, missing: tuple[str, ...]) -> Chunk:
    after = number + len(values)
    return Chunk("rows", source, values, number, Place(source, after, after), 0, fields=missing)


def _stream(name: str, place: Place, config: str | None, split: str) -> Iterator[Any]:
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each of six attempts
    if not Path(name).is_dir() and (reason := why_unreachable()):
        raise _unreachable(name, reason)
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=True)
        return iter(data.skip(place.offset) if place.offset else data)
    except Exception as error:
        raise _unreachable(name, f"{type(error).__name__}: {_first_line(error)}") from error


def _next(rows: Iterator[Any], name: str) -> Any:
    try:
        return next(rows, None)
    except Exception as error:
        raise _unreachable(name, f"{type(error).__name__}: {_first_line(error)}") from error


def _unreachable(name: str, reason: str) -> OSError:
    return OSError(
        f"{name}: cannot be streamed from the Hub ({reason}); check the name (no such file or folder is "
        "here), --hub-config, --hub-split and the network"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
