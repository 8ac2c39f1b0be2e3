"""Parquet files and streamed data sets: every row once, from any row on, whatever the layout."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data.chunks import START, Chunk, Cutting, Place
from mobilellm.data.inputs import Source
from mobilellm.data.records import records_of
from mobilellm.data.tables import hub_chunks, parquet_chunks


def chunks(path: Path, place: Place = START, size: int = 100, field: str = "text") -> list[Chunk]:
    return list(parquet_chunks(Source(str(path), "parquet", path.stat().st_size), place, field, size))


def values(found: list[Chunk]) -> list[Any]:
    return [value for chunk in found for value in chunk.content]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=50)), max_size=40
    ),
    st.integers(1, 20),
    st.integers(1, 400),
    st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    st.data(),
)
def test_every_row_once(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[str | None],
    group: int,
    size: int,
    kind: Any,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    table = pa.table({"id": list(range(len(rows))), "text": pa.array(rows, pa.string()).cast(kind)})
    pq.write_table(table, path, row_group_size=group)
    found = chunks(path, size=size)
    assert values(found) == rows
    row = 0
    for chunk in found:
        assert chunk.number == row
        row += len(chunk.content)
        assert chunk.next == Place(0, row, row)
    at = data.draw(st.integers(0, len(rows)))
    rest = chunks(path, Place(0, at, at), size)
    assert values(rest) == rows[at:]
    assert not rest or rest[0].number == at


def test_numbers_are_no_text_and_missing_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]}), tmp_path / "x.parquet", row_group_size=2)
    assert values(chunks(tmp_path / "x.parquet", field="a")) == [1, 2, 3]
    missing = chunks(tmp_path / "x.parquet")
    assert values(missing) == [None, None, None]
    assert {chunk.fields for chunk in missing} == {("a", "b")}
    assert values(chunks(tmp_path / "x.parquet", Place(0, 1, 1))) == [None, None]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
)
def test_bytes_that_are_no_utf8_cost_their_row_alone(tmp_path: Path, kind: Any) -> None:
    rows = [b"one", b"caf\xe9", None, "zwei é".encode()]
    column = pa.array(rows, pa.binary())
    if kind != pa.binary():  # as a writer that does not check leaves them
        column = pa.Array.from_buffers(pa.string(), len(rows), column.buffers()).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    source = Source(str(tmp_path / "x.parquet"), "parquet", 1)
    found = [
        record
        for chunk in parquet_chunks(source, START, "text")
        for record in records_of(chunk, "text", Cutting(), {})
    ]
    assert found == [(0, "one", ""), (1, "caf\ufffd", "not UTF-8"), (2, "", "not text"), (3, "zwei é", "")]


def test_lists_of_bytes_that_are_no_utf8_are_no_text(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xe9"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 2, texts.buffers())
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), bad)
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert values(chunks(tmp_path / "x.parquet")) == [["a"], None]


def test_long_texts_come_a_few_at_a_time(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": [str(i) * 5000 for i in range(40)]}), tmp_path / "x.parquet", use_dictionary=False
    )
    assert max(len(chunk.content) for chunk in chunks(tmp_path / "x.parquet", size=20_000)) <= 4


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """Some writers make a whole file one group."""
    table = pa.table({"text": [f"{i} " * 500 for i in range(10_000)]})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, compression="none")
    size = (tmp_path / "x.parquet").stat().st_size
    tracemalloc.start()
    count = sum(
        len(chunk.content)
        for chunk in parquet_chunks(Source(str(tmp_path / "x.parquet"), "parquet", size), START, "text")
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < size / 3


def test_packed_and_damaged_files(tmp_path: Path) -> None:
    plain = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"text {i} " * 50 for i in range(1000)]}), plain, row_group_size=100)
    content = plain.read_bytes()
    packed = tmp_path / "x.parquet.gz"
    packed.write_bytes(gzip.compress(content))
    assert values(chunks(packed)) == values(chunks(plain))
    for damaged in (content[:-100], b"PAR1" + content[4:200], b"no parquet", b""):
        plain.write_bytes(damaged)
        (chunk,) = chunks(plain)
        assert (chunk.content, chunk.number, chunk.next) == ([], 0, Place(1, 0, 1))
        assert chunk.problem.startswith("damaged (")
    packed.write_bytes(packed.read_bytes()[:-10])
    assert chunks(packed)[-1].problem == "damaged (it ends early)"


def test_a_damaged_row_group_comes_after_the_good_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": [f"text {i} " * 50 for i in range(1000)]}),
        path,
        row_group_size=100,
        compression="zstd",
    )
    column = pq.ParquetFile(path).metadata.row_group(5).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    *good, last = chunks(path)
    assert values(good) == [f"text {i} " * 50 for i in range(500)]
    assert (last.number, last.next) == (500, Place(1, 0, 1))
    assert last.problem.startswith("damaged (")


@pytest.fixture
def data_set(tmp_path: Path) -> str:
    """A folder that `datasets` loads as it loads one of the Hub."""
    pq.write_table(
        pa.table({"text": [f"text {i}" for i in range(100)], "n": list(range(100))}), tmp_path / "x.parquet"
    )
    return str(tmp_path)


def hub(name: str, place: Place = START, field: str = "text", size: int = 50) -> list[Chunk]:
    return list(hub_chunks(Source(name, "hub"), place, field, None, "train", size))


def test_a_streamed_data_set(data_set: str) -> None:
    found = hub(data_set)
    assert values(found) == [f"text {i}" for i in range(100)]
    assert len(found) > 5
    rest = hub(data_set, found[3].next)
    assert [chunk[:5] for chunk in rest] == [chunk[:5] for chunk in found[4:]]
    missing = hub(data_set, field="body")
    assert values(missing) == [None] * 100
    assert {chunk.fields for chunk in missing} == {("text", "n")}


def test_a_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"no-such-org/no-such-set: cannot be streamed from the Hub \(.*--hub-split"
    ) as caught:
        hub("no-such-org/no-such-set")
    assert "\n" not in str(caught.value)
