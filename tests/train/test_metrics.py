"""The log of a run: whole records, none twice, and what a crash leaves is understood."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.train.metrics import MetricsLog, Record, read_metrics

RECORDS: list[Record] = [
    {"step": 0, "eval": {"loss": 6.0}},
    {"step": 1, "loss": 5.5, "name": "é\u2028\n"},
    {"step": 2, "loss": 5.25},
    {"step": 2, "eval": {"loss": 5.1}},
    {"step": 3, "loss": 5.0},
]


def write(file: Path, step: int, records: list[Record]) -> None:
    log = MetricsLog(file, step)
    for record in records:
        log.write(record)
    log.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "metrics.jsonl", -1, RECORDS)
    return tmp_path / "metrics.jsonl"


def test_what_is_written_is_read(file: Path) -> None:
    assert read_metrics(file) == RECORDS
    lines = file.read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines] == RECORDS  # one object a line, for any reader


def test_every_record_is_there_at_once(tmp_path: Path) -> None:
    """Not only when the log is closed: a reader follows a running run, and a kill loses nothing."""
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    for count, record in enumerate(RECORDS, 1):
        log.write(record)
        assert read_metrics(tmp_path / "metrics.jsonl") == RECORDS[:count]
    log.sync()
    log.close()


@pytest.mark.parametrize(("step", "kept"), [(-1, 0), (0, 1), (1, 2), (2, 4), (3, 5), (9, 5)])
def test_going_on_drops_what_came_later(file: Path, step: int, kept: int) -> None:
    new = {"step": step + 1, "loss": 1.0}
    write(file, step, [new])
    assert read_metrics(file) == [*RECORDS[:kept], new]
    assert list(file.parent.iterdir()) == [file]


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
    write(tmp_path / "none", 5, [])
    assert read_metrics(tmp_path / "none") == []


@given(cut=st.integers(0, 200))
def test_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A crash may cut the file at any byte; whole records before the cut stay."""
    file = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    write(file, -1, RECORDS)
    content = file.read_bytes()
    file.write_bytes(content[:cut])
    whole = [json.loads(line) for line in content[:cut].split(b"\n")[:-1]]
    found = read_metrics(file)
    assert found in (whole, RECORDS[: len(whole) + 1])  # a record may lack but its line end
    assert len(found) == len(whole) or content[cut : cut + 1] == b"\n"
    write(file, 9, [{"step": 10}])
    assert read_metrics(file) == [*found, {"step": 10}]


@pytest.mark.parametrize(
    "rest", [b"\0\0\0\0", b"\xff\xfe", b'{"loss": 1}', b"7", b"null", b"[" * 5000, b"\n\n"]
)
def test_rubbish_at_the_end_is_left_out(file: Path, rest: bytes) -> None:
    """A machine that loses power may leave zeros, for instance."""
    file.write_bytes(file.read_bytes() + rest)
    assert read_metrics(file) == RECORDS


@pytest.mark.parametrize("bad", ['{"step": 1, "lo', '{"loss": 5}', "5", '{"step": "1"}', '{"step": true}'])
def test_damage_before_whole_records_is_told(file: Path, bad: str) -> None:
    """Not dropped in silence with all that follows it."""
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
    before = file.read_bytes()
    for attempt in (lambda: read_metrics(file), lambda: MetricsLog(file, 3)):
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: line 2 is damaged"):
            attempt()
    assert file.read_bytes() == before


def test_remains_of_a_killed_process_are_cleared(file: Path) -> None:
    (file.parent / "metrics.jsonl.tmp-1-abc").write_text("half")
    (file.parent / "metrics.jsonl.kept").write_text("the user's")
    write(file, 1, [])
    assert sorted(path.name for path in file.parent.iterdir()) == ["metrics.jsonl", "metrics.jsonl.kept"]
