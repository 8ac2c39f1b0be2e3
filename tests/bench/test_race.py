"""Turns, medians and ratios, with contestants whose times are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mobilellm.bench import race
from mobilellm.bench.entries import Entry
from mobilellm.bench.race import race_decode, race_prefill, times_faster
from mobilellm.bench.worker import WorkerError

ABOUT = {"bytes_per_token": 1_000_000, "cache_bytes_per_token": 1_000, "version": "1", "backends": "x"}


class Clockwork:
    """A worker whose n-th turn takes n times as long as its first."""

    turns: list[tuple[str, str, dict[str, int]]] = []  # noqa: RUF012  # emptied by the fixture

    def __init__(self, kind: str, source: Path, threads: int, room: int) -> None:
        if kind == "llama.cpp" and source.name == "refused":
            raise WorkerError("it does not like the file")
        self.kind, self.about, self.room, self._turn = kind, ABOUT, room, 0

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, name: str, **arguments: int) -> float:
        self.turns.append((self.kind, name, arguments))
        if name == "read_memory":
            return 2e9
        self._turn += 1
        return self._turn * (0.01 if self.kind == "runtime" else 0.03)


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    Clockwork.turns.clear()
    monkeypatch.setattr(race, "Worker", Clockwork)
    monkeypatch.setattr(race, "REST", 0)
    monkeypatch.setattr(Entry, "described", {})


OURS, THEIRS = Entry("m", "runtime", Path("m")), Entry("m", "llama.cpp", Path("m"))


def ignore(done: int, total: int, whose: str) -> None:
    pass


def test_every_round_measures_each_and_the_first_does_not_count() -> None:
    told: list[tuple[int, int, str]] = []
    outcome = race_decode([OURS, THEIRS], [8, 0], 4, 3, 2, lambda *turn: told.append(turn))
    one_round = ["read_memory", "decode", "decode"]
    assert [name for _, name, _ in Clockwork.turns] == one_round * 8
    decoded = [(kind, *its.values()) for kind, name, its in Clockwork.turns if name == "decode"]
    assert (
        decoded == [("runtime", 0, 4), ("llama.cpp", 0, 4)] * 4 + [("runtime", 8, 4), ("llama.cpp", 8, 4)] * 4
    )
    assert [timing.length for timing in outcome.timings] == [(0, 4, 0)] * 2 + [(0, 4, 8)] * 2
    assert outcome.timings[0].seconds == pytest.approx((0.02, 0.03, 0.04))
    assert told[0] == (1, 16, "m, mobilellm, 0")
    assert told[-1] == (16, 16, "m, llama.cpp, 8")


def test_numbers_of_a_decoding() -> None:
    timing = race_decode([OURS, THEIRS], [100], 4, 3, 2, ignore).timings[0]
    assert timing.tokens_per_second == pytest.approx(4 / 0.03)
    # A token reads the weights and, on average, the keys and values of 102 tokens.
    assert timing.read_per_second == pytest.approx(1_102_000 * 4 / 0.03)
    assert timing.share_of_bandwidth == pytest.approx(1_102_000 * 4 / 0.03 / 2e9)
    record = timing.record()
    assert record["samples_ns"] == [20_000_000, 30_000_000, 40_000_000]
    assert (record["avg_ns"], record["stddev_ns"]) == (30_000_000, 10_000_000)
    assert record["avg_ts"] == pytest.approx((4 / 0.02 + 4 / 0.03 + 4 / 0.04) / 3, abs=1e-3)
    assert (record["n_prompt"], record["n_gen"], record["n_depth"]) == (0, 4, 100)
    assert record["best_ts"] == pytest.approx(200)


def test_a_prompt_has_no_share_of_bandwidth() -> None:
    timing = race_prefill([OURS], [100], 1, 2, ignore).timings[0]
    assert timing.tokens_per_second == pytest.approx(100 / 0.02)
    assert timing.read_per_second is timing.share_of_bandwidth is None
    assert timing.deviation == 0


def test_ratios_are_of_the_same_length_and_of_the_same_model_if_it_was_measured() -> None:
    program = Entry("program", "executorch", Path("p"))
    slow = Entry("slow", "torch", Path("s"))
    beside = Entry("slow", "transformers", Path("s"))
    entries = [OURS, THEIRS, slow, beside, program]
    timings = race_decode(entries, [0, 8], 4, 3, 2, ignore).timings
    ratios = [times_faster(timings, timing) for timing in timings]
    assert ratios == [None, pytest.approx(3), None, pytest.approx(1), pytest.approx(3)] * 2
    assert times_faster([timing for timing in timings if not timing.entry.is_ours], timings[1]) is None


def test_a_peer_that_refuses_the_file_is_named() -> None:
    refused = Entry("r", "llama.cpp", Path("refused"))
    outcome = race_decode([OURS, refused], [0], 4, 1, 2, ignore)
    assert [timing.entry for timing in outcome.timings] == [OURS]
    assert outcome.failures == ["llama.cpp could not run r: it does not like the file"]


def test_without_the_engine_no_bandwidth_is_claimed() -> None:
    timing = race_decode([THEIRS], [0], 4, 1, 2, ignore).timings[0]
    assert timing.memory == ()
    assert timing.share_of_bandwidth is None
    record: dict[str, Any] = timing.record()
    assert record["memory_gb_per_second"] is record["share_of_bandwidth"] is None
