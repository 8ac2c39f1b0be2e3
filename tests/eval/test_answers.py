"""Kept answers are the model's own, bit for bit, whatever happens to the process, the disk, or the file."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import IDENTITY, MANY, Oracle, answer_to, same

from mobilellm.eval import answers_file
from mobilellm.eval.answers import Cached, default_folder
from mobilellm.eval.interface import Request

IDS = st.lists(st.integers(0, 300), min_size=1, max_size=6).map(tuple)
REQUESTS = st.lists(st.builds(Request, IDS, IDS), max_size=10)


@settings(deadline=None, max_examples=30)
@given(first=REQUESTS, second=REQUESTS, taken=st.integers(0, 10))
def test_kept_answers_equal_the_models_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, first: list[Request], second: list[Request], taken: int
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    with_break = Cached(Oracle(), folder)
    answers = with_break.log_likelihoods(first)
    for _ in range(min(taken, len(first))):
        next(answers)
    answers.close()
    with_break.close()
    cached = Cached(Oracle(), folder)
    requests = [*second, *first]
    found = list(cached.log_likelihoods(requests))
    assert sorted(number for number, _ in found) == list(range(len(requests)))
    assert all(same(answer, answer_to(requests[number])) for number, answer in found)
    assert cached.cached + cached.scored == len(requests)
    known = {request for request in first if request in set(first[-taken:] if taken else [])}
    assert cached.cached == sum(request in known for request in requests)  # the oracle begins with the last


def test_what_is_kept_comes_first_and_is_not_asked_again(tmp_path: Path) -> None:
    cached = Cached(Oracle(), tmp_path)
    assert dict(cached.log_likelihoods(MANY[:50])).keys() == set(range(50))
    assert (cached.cached, cached.scored) == (0, 50)
    model = Oracle()
    again = Cached(model, tmp_path)
    order = [number for number, _ in again.log_likelihoods(MANY[40:60])]
    assert order[:10] == list(range(10))
    assert (again.cached, again.scored, model.asked) == (10, 10, 10)
    assert list(again.log_likelihoods([])) == []


def test_what_waits_is_written_when_the_caller_stops_listening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_file, "_SHARE", 0.0)
    monkeypatch.setattr(answers_file, "_SECONDS", 1e9)
    cached = Cached(Oracle(), tmp_path)
    answers = cached.log_likelihoods(MANY)
    for _ in range(5):
        next(answers)
    with closing(sqlite3.connect(cached.file)) as other:
        count = "SELECT count(*) FROM likelihoods"
        assert other.execute(count).fetchone() == (0,)
        answers.close()
        assert other.execute(count).fetchone() == (5,)


def test_the_rest_of_the_model_shines_through(tmp_path: Path) -> None:
    cached = Cached(Oracle(), tmp_path)
    assert (cached.identity, cached.context, cached.bos) == (IDENTITY, 1000, 1)
    assert cached.encode(["ab"]) == [[1, 97, 98]]
    assert cached.encode(["ab"], special=False) == [[97, 98]]
    assert cached.encode_with_places("ab") == ([97, 98], [0, 1])
    with pytest.raises(ValueError, match="an empty context"):
        list(cached.log_likelihoods([Request((), (1,))]))


def test_greedy_texts(tmp_path: Path) -> None:
    prompts = [[1, 2], [3], [1, 2], [4, 5, 6]]
    first = Cached(Oracle(), tmp_path)
    wanted = Oracle().greedy(prompts, ["\n"], 5)
    assert first.greedy(prompts, ["\n"], 5) == wanted
    assert (first.cached, first.scored) == (0, 4)
    model = Oracle()
    again = Cached(model, tmp_path)
    assert again.greedy([*prompts, [7]], ["\n"], 5) == [*wanted, *Oracle().greedy([[7]], ["\n"], 5)]
    assert (again.cached, again.scored, model.asked) == (4, 1, 1)
    again.greedy(prompts[:1], ["\n"], 6)
    again.greedy(prompts[:1], ["."], 5)
    assert model.asked == 3  # another length, another stop string


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "e" * 64}, {"backend": "transformers"}, {"dtype": "bfloat16"}, {"device": "cuda:0"}],
)
def test_other_arithmetic_has_other_answers(tmp_path: Path, change: dict[str, str]) -> None:
    first, other = Cached(Oracle(), tmp_path), Cached(Oracle(replace(IDENTITY, **change)), tmp_path)
    list(first.log_likelihoods(MANY[:5]))
    list(other.log_likelihoods(MANY[:5]))
    assert first.file != other.file
    assert other.cached == 0


def test_the_same_model_elsewhere_has_the_same_answers(tmp_path: Path) -> None:
    list(Cached(Oracle(replace(IDENTITY, device="cuda:0")), tmp_path).log_likelihoods(MANY[:5]))
    moved = Cached(Oracle(replace(IDENTITY, device="cuda:1", name="elsewhere")), tmp_path)
    list(moved.log_likelihoods(MANY[:5]))
    assert moved.cached == 5


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "mobilellm" / "evaluations"
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert default_folder() == tmp_path / ".cache" / "mobilellm" / "evaluations"
    assert Cached(Oracle()).file.parent == default_folder()


# Processes

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from oracle import MANY, Oracle, answer_to, same
from mobilellm.eval import answers_file
from mobilellm.eval.answers import Cached
cached = Cached(Oracle(seconds={seconds}), Path({folder!r}), say=lambda line: print(line, file=sys.stderr))
for number, answer in cached.log_likelihoods(MANY):
    assert same(answer, answer_to(MANY[number]))
    print(number, flush=True)
print("cached", cached.cached, "scored", cached.scored, flush=True)
"""


def process(folder: Path, seconds: float) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), seconds=seconds)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_process_loses_a_second_at_most(tmp_path: Path) -> None:
    running = process(tmp_path, seconds=0.05)
    assert running.stdout is not None
    given = [int(running.stdout.readline()) for _ in range(30)]
    os.kill(running.pid, signal.SIGKILL)
    given += [int(line) for line in running.stdout.read().splitlines()]
    running.wait()
    model = Oracle()
    cached = Cached(model, tmp_path)
    found = dict(cached.log_likelihoods(MANY))
    assert all(same(answer, answer_to(MANY[number])) for number, answer in found.items())
    assert len(given) - 20 <= cached.cached <= len(given) + 1 < len(MANY)
    assert model.asked == cached.scored == len(MANY) - cached.cached


def test_several_processes_at_once(tmp_path: Path) -> None:
    running = [process(tmp_path, seconds=0.001) for _ in range(4)]
    for each in running:
        out, errors = each.communicate(timeout=300)
        assert (each.returncode, errors) == (0, "")
        assert len(out.splitlines()) == len(MANY) + 1
    cached = Cached(Oracle(), tmp_path)
    list(cached.log_likelihoods(MANY))
    assert cached.cached == len(MANY)


# Disks and files


def test_where_nothing_can_be_written_scoring_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cached = Cached(Oracle(), tmp_path / "file" / "below", said.append)
    for _ in range(2):
        found = dict(cached.log_likelihoods(MANY))
        assert all(same(answer, answer_to(MANY[number])) for number, answer in found.items())
    (line,) = said
    assert (
        line == f"{cached.file}: answers are not kept from here on (Not a directory); scoring goes on without"
    )
    assert (cached.cached, cached.scored) == (0, 2 * len(MANY))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("max_page_count = 1", "database or disk is full"),
        ("query_only = 1", "attempt to write a readonly database"),
    ],
)
def test_a_disk_that_is_full_later(tmp_path: Path, setting: str, reason: str) -> None:
    said: list[str] = []
    cached = Cached(Oracle(), tmp_path, said.append)
    list(cached.log_likelihoods(MANY[:3]))
    assert cached._answers is not None
    cached._answers._database.execute(f"PRAGMA {setting}")
    long = [Request(request.context, request.continuation * 100) for request in MANY]
    found = dict(cached.log_likelihoods([*MANY[:3], *long]))
    assert len(found) == 3 + len(long)
    assert cached.cached == 3
    (line,) = said
    assert reason in line
    again = Cached(Oracle(), tmp_path)
    list(again.log_likelihoods(MANY[:3]))
    assert again.cached == 3


def test_a_file_that_is_none(tmp_path: Path) -> None:
    cached = Cached(Oracle(), tmp_path)
    cached.close()
    file = cached.file
    file.write_bytes(b"no database at all, but long enough to be looked at" * 20)
    with pytest.raises(
        ValueError, match="are damaged .*; delete the file, and they are computed again"
    ) as caught:
        Cached(Oracle(), tmp_path)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE of_something_else (x)")
    other.close()
    with pytest.raises(ValueError, match="holds other things than the answers of this model"):
        Cached(Oracle(), tmp_path)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.integers(1, 40))
def test_a_damaged_file_gives_no_wrong_answer(
    tmp_path_factory: pytest.TempPathFactory, place: float, change: int, length: int
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    cached = Cached(Oracle(), folder)
    list(cached.log_likelihoods(MANY[:20]))
    cached.close()
    content = bytearray(cached.file.read_bytes())
    start = int(place * len(content))
    for index in range(start, min(start + length, len(content))):
        content[index] ^= change
    cached.file.write_bytes(content)
    error = ""
    try:
        again = Cached(Oracle(), folder, say=lambda _: None)
        for number, answer in again.log_likelihoods(MANY[:20]):
            assert same(answer, answer_to(MANY[number]))
    except ValueError as caught:
        error = str(caught)
    assert error == "" or (error.startswith(str(cached.file)) and "\n" not in error)


@pytest.mark.parametrize("part", ["tokens", "greedy"])
def test_a_damaged_answer_is_not_used(tmp_path: Path, part: str) -> None:
    """The database does not notice it: one bit within a value."""
    cached = Cached(Oracle(), tmp_path)
    list(cached.log_likelihoods(MANY))
    cached.close()
    content = bytearray(cached.file.read_bytes())
    place = content.index(answer_to(MANY[3]).tokens.astype("<f4").tobytes())
    content[place + 1 if part == "tokens" else place - 1] ^= 1
    cached.file.write_bytes(content)
    again = Cached(Oracle(), tmp_path)
    assert len(dict(again.log_likelihoods(MANY[4:]))) == len(MANY) - 4
    with pytest.raises(ValueError, match=r"damaged \(a checksum is wrong\); delete the file"):
        list(again.log_likelihoods(MANY))
