"""The loader: every token once an epoch, the same order on any number of devices, exact resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilellm.data.loader import Batch, PackedLoader


def numbered(length: int) -> NDArray[np.uint16]:
    """A stream in which every token is its own position."""
    return np.arange(length, dtype=np.uint16)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    """Stream length, window and step of a loader that has enough data."""
    window, per_step = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    tokens = 1 + window * (per_step + draw(st.integers(0, 20))) + draw(st.integers(0, window - 1))
    return {"tokens": tokens, "sequence_length": window, "sequences_per_step": per_step}


def loader(shape: dict[str, int], seed: int = 0, rank: int = 0, world_size: int = 1) -> PackedLoader:
    arguments = {name: value for name, value in shape.items() if name != "tokens"}
    return PackedLoader(numbered(shape["tokens"]), seed=seed, rank=rank, world_size=world_size, **arguments)


def same(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def windows_of(source: PackedLoader, count: int) -> list[list[int]]:
    """At least the next `count` windows of targets, row by row over the steps."""
    rows: list[list[int]] = []
    while len(rows) < count:
        rows += source.next().targets.tolist()
    return rows


@settings(deadline=None)
@given(shapes(), st.integers(0, 2**63))
def test_every_token_is_predicted_once_an_epoch(shape: dict[str, int], seed: int) -> None:
    windows = (shape["tokens"] - 1) // shape["sequence_length"]
    rows = windows_of(loader(shape, seed), 3 * windows)  # steps reach over the borders of epochs
    for epoch in range(3):
        targets = [target for row in rows[epoch * windows : (epoch + 1) * windows] for target in row]
        assert sorted(targets) == list(range(1, windows * shape["sequence_length"] + 1))
        assert shape["tokens"] - 1 - max(targets) < shape["sequence_length"]  # only a short tail is left


@settings(deadline=None)
@given(shapes(), st.integers(1, 5))
def test_targets_are_the_tokens_that_follow(shape: dict[str, int], steps: int) -> None:
    source = loader(shape)
    for _ in range(steps):
        tokens, targets, weights = source.next()
        wanted = (shape["sequences_per_step"], shape["sequence_length"])
        assert tokens.shape == targets.shape == weights.shape == wanted
        assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int64, np.int64, np.float32)
        assert np.array_equal(targets, tokens + 1)
        assert np.array_equal(tokens, tokens[:, :1] + np.arange(shape["sequence_length"]))
        assert (weights == 1).all()


@settings(deadline=None)
@given(shapes(), st.integers(1, 4), st.integers(0, 2**32), st.integers(1, 8))
def test_the_order_does_not_depend_on_the_number_of_devices(
    shape: dict[str, int], world_size: int, seed: int, steps: int
) -> None:
    shape["sequences_per_step"] *= world_size
    shape["tokens"] += shape["sequence_length"] * shape["sequences_per_step"]
    alone = loader(shape, seed)
    ranks = [loader(shape, seed, rank, world_size) for rank in range(world_size)]
    for _ in range(steps):
        shares = [rank.next() for rank in ranks]
        together = Batch(*(np.concatenate(parts) for parts in zip(*shares, strict=True)))
        assert same(together, alone.next())
        assert {json.dumps(rank.state()) for rank in ranks} == {json.dumps(alone.state())}


@settings(deadline=None)
@given(shapes(), st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
def test_after_a_restore_the_next_batch_is_the_same(
    shape: dict[str, int], before: int, wasted: int, world_size: int
) -> None:
    """At any point of any epoch, on as many devices as one likes, even in a loader that was used before."""
    shape["sequences_per_step"] *= world_size
    shape["tokens"] += shape["sequence_length"] * shape["sequences_per_step"]
    original = loader(shape, seed=3)
    for _ in range(before):
        original.next()
    state = json.loads(json.dumps(original.state()))
    resumed = [loader(shape, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank in resumed:
        for _ in range(wasted):
            rank.next()
        rank.restore(state)
    for _ in range(8):
        shares = [rank.next() for rank in resumed]
        assert same(Batch(*(np.concatenate(parts) for parts in zip(*shares, strict=True))), original.next())
    assert resumed[0].state() == original.state()
    assert resumed[0].epoch == original.epoch


def test_the_order_is_the_same_for_ever() -> None:
    """Pinned: another order after an update of numpy would break the resumption of every run."""
    source = PackedLoader(numbered(9), 1, 1, seed=7)
    order = [row[0] - 1 for row in windows_of(source, 16)]
    assert order == [6, 3, 4, 0, 2, 7, 5, 1, 1, 3, 2, 7, 4, 5, 0, 6]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    shape = {"tokens": 101, "sequence_length": 1, "sequences_per_step": 1}
    first = windows_of(loader(shape, seed=0), 200)
    assert first[:100] != first[100:]
    assert windows_of(loader(shape, seed=1), 100) != first[:100]
    assert windows_of(loader(shape, seed=0), 200) == first
    assert first[:100] != sorted(first[:100])


def test_epochs_are_counted() -> None:
    source = loader({"tokens": 41, "sequence_length": 4, "sequences_per_step": 4})
    assert source.num_windows == 10
    seen = []
    for _ in range(5):
        seen.append(source.epoch)
        source.next()
    assert seen == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_large_ids_survive(tmp_path: Path, dtype: str) -> None:
    """From a memory-mapped file as from an array; uint16 must not turn negative."""
    ids = np.array([65_535, 0, 40_000, 1, 65_534], dtype=dtype)
    ids.tofile(tmp_path / "ids")
    tokens, targets, _ = PackedLoader(np.memmap(tmp_path / "ids", dtype=dtype, mode="r"), 4, 1, 0).next()
    assert tokens.tolist() == [[65_535, 0, 40_000, 1]]
    assert targets.tolist() == [[0, 40_000, 1, 65_534]]


@pytest.mark.parametrize(
    ("tokens", "window", "per_step"), [(0, 4, 1), (1, 4, 1), (4, 4, 1), (8, 4, 2), (40, 4, 10)]
)
def test_refuses_too_little_data(tokens: int, window: int, per_step: int) -> None:
    shape = {"tokens": tokens, "sequence_length": window, "sequences_per_step": per_step}
    with pytest.raises(ValueError, match=f"data: {tokens} tokens give .* give more text or a smaller batch"):
        loader(shape)
    loader(shape | {"tokens": window * per_step + 1})  # just enough


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_length": 0}, "sequence_length = 0 must be at least 1"),
        ({"sequences_per_step": 0}, "sequences_per_step = 0 must be at least 1"),
        ({"seed": -1}, "seed = -1 must be 0 or above"),
        ({"rank": 2, "world_size": 2}, r"rank = 2 must lie in 0 … 1"),
        ({"rank": -1}, "rank = -1 must lie in"),
        ({"world_size": 0}, "world_size = 0 must be at least 1"),
        ({"world_size": 3}, "4 sequences a step cannot be shared by 3 devices"),
    ],
)
def test_refuses_bad_arguments(change: dict[str, int], words: str) -> None:
    arguments: dict[str, Any] = {"sequence_length": 2, "sequences_per_step": 4, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        PackedLoader(numbered(100), **arguments)


def test_refuses_foreign_states() -> None:
    shape = {"tokens": 81, "sequence_length": 4, "sequences_per_step": 2}
    source = loader(shape)
    source.next()
    good = source.state()
    others = {
        "tokens": loader(shape | {"tokens": 82}),
        "sequence_length": loader(shape | {"sequence_length": 5}),
        "seed": loader(shape, seed=1),
        "fingerprint": PackedLoader(numbered(81)[::-1].copy(), 4, 2, seed=0),  # other text of the same size
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"resume: the loader has {name} = .* and the checkpoint"):
            loader(shape).restore(other.state())
        untouched = loader(shape)
        with pytest.raises(ValueError, match="resume with the same data"):
            untouched.restore(other.state())
        assert same(untouched.next(), loader(shape).next())
    for bad in ({}, {**good, "window": -2}, {**good, "window": "2"}, {**good, "window": 1.5}):
        with pytest.raises(ValueError, match="resume: "):
            loader(shape).restore(bad)
    del good["window"]
    with pytest.raises(ValueError, match="window = None"):
        loader(shape).restore(good)


def test_a_large_stream_with_another_middle_is_foreign() -> None:
    """The fingerprint reads samples only, but from all over."""
    stream = np.zeros(1_000_000, dtype=np.uint16)
    other = stream.copy()
    other[400_000:600_000] = 1
    state = PackedLoader(stream, 128, 8, seed=0).state()
    with pytest.raises(ValueError, match="fingerprint"):
        PackedLoader(other, 128, 8, seed=0).restore(state)
