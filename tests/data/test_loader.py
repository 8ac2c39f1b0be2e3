"""The loader: every token once an epoch, the same order on any number of devices, exact resumption."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilellm.data.loader import Batch, PackedLoader
from mobilellm.tokenizer import BOS_ID


def numbered(length: int, first: int = 0) -> NDArray[np.uint16]:
    """A stream in which every token tells its own position."""
    return np.arange(first, first + length, dtype=np.uint16)


def numbered_streams(lengths: list[int]) -> list[NDArray[np.uint16]]:
    """In which no number comes twice."""
    return [numbered(length, 1000 * number + 2) for number, length in enumerate(lengths)]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Lengths of the streams, window and step of a loader that has enough data."""
    window, per_step = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=4))
    lengths[0] += window * per_step
    return {"lengths": lengths, "sequence_length": window, "sequences_per_step": per_step}


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Such shapes with weights or without, with documents kept apart or not."""
    shape = draw(shapes())
    count = len(shape["lengths"])
    weights = draw(st.one_of(st.just([]), st.lists(st.floats(0.01, 10), min_size=count, max_size=count)))
    return shape | {"weights": weights, "document_mask": draw(st.booleans())}


def loader(shape: dict[str, Any], seed: int = 0, rank: int = 0, world_size: int = 1) -> PackedLoader:
    arguments = {name: value for name, value in shape.items() if name != "lengths"}
    streams = numbered_streams(shape["lengths"])
    if shape.get("document_mask"):
        for stream in streams:
            stream[::7] = BOS_ID  # documents of seven tokens
    return PackedLoader(streams, seed=seed, rank=rank, world_size=world_size, **arguments)


def for_several(shape: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The shape with a step that so many devices can share, and data enough for it."""
    per_step = shape["sequences_per_step"] * world_size
    lengths = list(shape["lengths"])
    lengths[0] += per_step * shape["sequence_length"]
    return shape | {"sequences_per_step": per_step, "lengths": lengths}


def joined(parts: list[Batch]) -> Batch:
    """The batch of all devices, by rank."""
    segments = None if parts[0].segments is None else np.concatenate([part.segments for part in parts])
    return Batch(
        *(np.concatenate(each) for each in zip(*(part[:3] for part in parts), strict=True)), segments
    )


def same(a: Batch, b: Batch) -> bool:
    return all(
        x is y or (x.dtype == y.dtype and np.array_equal(x, y))  # None is None
        for x, y in zip(a, b, strict=True)
    )


def rows_of(source: PackedLoader, count: int) -> list[tuple[list[int], list[int], list[float]]]:
    """At least the next `count` windows: tokens, targets, weights, row by row over the steps."""
    rows: list[tuple[list[int], list[int], list[float]]] = []
    while len(rows) < count:
        batch = source.next()
        rows += zip(batch.tokens.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True)
    return rows


def counted(rows: list[tuple[list[int], list[int], list[float]]]) -> tuple[list[int], list[int]]:
    """Tokens that are read and tokens that are predicted, where the weight is 1. It is 0 elsewhere."""
    places = [
        (token, target, weight)
        for tokens, targets, weights in rows
        for token, target, weight in zip(tokens, targets, weights, strict=True)
    ]
    assert {weight for *_, weight in places} <= {0.0, 1.0}
    return (
        [token for token, _, weight in places if weight],
        [target for _, target, weight in places if weight],
    )


@settings(deadline=None)
@given(shapes(), st.integers(0, 2**63))
def test_every_token_is_read_once_and_predicted_once_an_epoch(shape: dict[str, Any], seed: int) -> None:
    source = loader(shape, seed)
    everything = [int(token) for stream in numbered_streams(shape["lengths"]) for token in stream]
    windows = sum(-(-length // shape["sequence_length"]) for length in shape["lengths"])
    assert source.num_windows == windows
    rows = rows_of(source, 3 * windows)  # steps reach over the borders of epochs
    for epoch in range(3):
        read, predicted = counted(rows[epoch * windows : (epoch + 1) * windows])
        assert sorted(read) == sorted(predicted) == everything


@settings(deadline=None)
@given(shapes(), st.integers(1, 5))
def test_targets_are_the_tokens_that_follow(shape: dict[str, Any], steps: int) -> None:
    """In the same stream; after its last token comes its first."""
    after = {}
    for stream in numbered_streams(shape["lengths"]):
        after |= dict(zip(stream.tolist(), np.roll(stream, -1).tolist(), strict=True))
    source = loader(shape)
    for _ in range(steps):
        tokens, targets, weights, segments, *teacher = source.next()
        assert teacher == [None, None]
        wanted = (shape["sequences_per_step"], shape["sequence_length"])
        assert tokens.shape == targets.shape == weights.shape == wanted
        assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int64, np.int64, np.float32)
        assert segments is None
        for row in range(len(tokens)):
            filled = int(weights[row].sum())
            assert weights[row].tolist() == [1.0] * filled + [0.0] * (len(weights[row]) - filled)
            assert filled > 0
            assert [after[token] for token in tokens[row, :filled].tolist()] == targets[row, :filled].tolist()
            assert tokens[row, 1:filled].tolist() == targets[row, : filled - 1].tolist()
            assert not tokens[row, filled + 1 :].any()
            assert not targets[row, filled:].any()


def test_a_last_window_by_hand() -> None:
    """Ten tokens in windows of four: two are left, which predict the last token and the first."""
    rows = rows_of(PackedLoader(numbered(10, 30), 4, 3, seed=0), 3)
    assert sorted(rows)[2] == ([38, 39, 30, 0], [39, 30, 0, 0], [1.0, 1.0, 0.0, 0.0])


@settings(deadline=None)
@given(mixtures(), st.integers(1, 4), st.integers(0, 2**32), st.integers(1, 8))
def test_the_order_does_not_depend_on_the_number_of_devices(
    shape: dict[str, Any], world_size: int, seed: int, steps: int
) -> None:
    shape = for_several(shape, world_size)
    alone = loader(shape, seed)
    ranks = [loader(shape, seed, rank, world_size) for rank in range(world_size)]
    for _ in range(steps):
        assert same(joined([rank.next() for rank in ranks]), alone.next())
        assert {json.dumps(rank.state()) for rank in ranks} == {json.dumps(alone.state())}


@settings(deadline=None)
@given(mixtures(), st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
def test_after_a_restore_the_next_batch_is_the_same(
    shape: dict[str, Any], before: int, wasted: int, world_size: int
) -> None:
    """At any point of any epoch, on as many devices as one likes, even in a loader that was used before."""
    shape = for_several(shape, world_size)
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
        assert same(joined([rank.next() for rank in resumed]), original.next())
    assert resumed[0].state() == original.state()
    assert resumed[0].epoch == original.epoch


PINNED = [2, 6, 5, 3, 7, 4, 0, 1, 3, 7, 5, 6, 4, 1, 0, 2]
PINNED_MIXTURE = [1, 12, 2, 0, 10, 2, 0, 11, 1, 1, 10, 2]


def test_the_order_is_the_same_for_ever() -> None:
    """Pinned: another order after an update of numpy would break the resumption of every run."""
    order = [tokens[0] for tokens, *_ in rows_of(PackedLoader(numbered(8), 1, 1, seed=7), 16)]
    assert order == PINNED
    mixture = PackedLoader([numbered(3), numbered(3, 10)], 1, 1, seed=7, weights=[2, 1])
    assert [tokens[0] for tokens, *_ in rows_of(mixture, 12)] == PINNED_MIXTURE


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    shape = {"lengths": [100], "sequence_length": 1, "sequences_per_step": 1}
    first = rows_of(loader(shape, seed=0), 200)
    assert first[:100] != first[100:]
    assert rows_of(loader(shape, seed=1), 100) != first[:100]
    assert rows_of(loader(shape, seed=0), 200) == first
    assert first[:100] != sorted(first[:100])


def test_epochs_are_counted() -> None:
    source = loader({"lengths": [39], "sequence_length": 4, "sequences_per_step": 4})
    assert source.num_windows == 10
    seen = []
    for _ in range(5):
        seen.append(source.epoch)
        source.next()
    assert seen == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])


# Mixtures


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(2, 5), st.integers(1, 7))
def test_a_mixture_keeps_its_proportions_at_every_point(
    data: st.DataObject, count: int, per_step: int
) -> None:
    """To within as many windows as there are pools, however long it goes on."""
    weights = data.draw(st.lists(st.floats(0.001, 100), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(2, 30), min_size=count, max_size=count))
    shape = {"lengths": [lengths[0] + per_step, *lengths[1:]], "sequence_length": 1}
    source = loader(shape | {"sequences_per_step": per_step, "weights": weights})
    pools = np.array([tokens[0] // 1000 for tokens, *_ in rows_of(source, 400)])
    seen = np.cumsum(pools[:, None] == np.arange(count), axis=0)
    shares = np.array(weights) / sum(weights)
    assert np.abs(seen - shares * np.arange(1, len(pools) + 1)[:, None]).max() < count
    assert source.state()["windows"] == seen[-1].tolist()


@settings(deadline=None, max_examples=40)
@given(shapes(), st.data())
def test_every_pool_of_a_mixture_has_epochs_of_its_own(shape: dict[str, Any], data: st.DataObject) -> None:
    count = len(shape["lengths"])
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    source = loader(shape | {"weights": weights}, seed=data.draw(st.integers(0, 99)))
    streams = numbered_streams(shape["lengths"])
    rows = rows_of(source, 4 * source.num_windows)
    most = []
    for number, stream in enumerate(streams):
        mine = [row for row in rows if row[0][0] // 1000 == number]
        windows = -(-len(stream) // shape["sequence_length"])
        most.append(len(mine) / windows)
        for start in range(0, len(mine) - windows + 1, windows):
            read, predicted = counted(mine[start : start + windows])
            assert sorted(read) == sorted(predicted) == stream.tolist()
    assert source.epoch == max(most)


def test_pools_of_a_mixture_are_shuffled_apart() -> None:
    """Two pools of one size do not deal out the same places at the same time."""
    source = loader({"lengths": [50, 50], "sequence_length": 1, "sequences_per_step": 2, "weights": [1, 1]})
    rows = [tokens[0] for tokens, *_ in rows_of(source, 100)]
    pools = [[token % 1000 for token in rows if token // 1000 == number] for number in range(2)]
    assert pools[0] != pools[1]
    assert sorted(pools[0]) == sorted(pools[1])


def test_equal_weights_take_turns() -> None:
    source = loader({"lengths": [9, 9, 9], "sequence_length": 3, "sequences_per_step": 9, "weights": [5] * 3})
    assert Counter(tokens[0] // 1000 for tokens, *_ in rows_of(source, 9)) == {0: 3, 1: 3, 2: 3}


# Documents kept apart


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=12),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_documents_kept_apart(sizes: list[int], length: int, seed: int, mixture: bool) -> None:
    """Segments change where a document begins; its first token is read but not predicted. All else is."""
    stream = np.concatenate([[BOS_ID, *range(10, 10 + size)] for size in sizes]).astype(np.uint16)
    apart = PackedLoader([stream], length, 1, seed, weights=[1] * mixture, document_mask=True)
    plain = PackedLoader([stream], length, 1, seed, weights=[1] * mixture)
    predicted: Counter[int] = Counter()
    for _ in range(apart.num_windows):
        batch, other = apart.next(), plain.next()
        assert same(Batch(*batch[:2], other.weights), other)  # the same windows in the same order
        assert batch.segments is not None
        assert batch.segments.shape == batch.tokens.shape
        assert batch.segments.dtype == np.int32
        steps = np.diff(batch.segments[0], prepend=batch.segments[0, 0] - (batch.tokens[0, 0] == BOS_ID))
        assert steps.tolist() == (batch.tokens[0] == BOS_ID).astype(int).tolist()
        assert batch.weights.tolist() == np.where(batch.targets == BOS_ID, 0, other.weights).tolist()
        predicted.update(batch.targets[batch.weights == 1].tolist())
    assert predicted == Counter(token for size in sizes for token in range(10, 10 + size))


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_large_ids_survive(tmp_path: Path, dtype: str) -> None:
    """From a memory-mapped file as from an array; uint16 must not turn negative."""
    ids = np.array([65_535, 0, 40_000, 1, 65_534], dtype=dtype)
    ids.tofile(tmp_path / "ids")
    tokens, targets, *_ = PackedLoader(np.memmap(tmp_path / "ids", dtype=dtype, mode="r"), 5, 1, 0).next()
    assert tokens.tolist() == [[65_535, 0, 40_000, 1, 65_534]]
    assert targets.tolist() == [[0, 40_000, 1, 65_534, 65_535]]


@pytest.mark.parametrize(("tokens", "window", "per_step"), [(3, 4, 2), (8, 4, 3), (40, 4, 11)])
def test_refuses_too_little_data(tokens: int, window: int, per_step: int) -> None:
    shape = {"sequence_length": window, "sequences_per_step": per_step}
    with pytest.raises(ValueError, match=f"data: {tokens} tokens give .*; give more text, or make") as caught:
        loader({"lengths": [tokens], **shape})
    fit = int(str(caught.value).rpartition("batch.tokens_per_step = ")[2])
    assert fit // window == -(-tokens // window)
    loader({"lengths": [tokens], **(shape | {"sequences_per_step": fit // window})})  # as it was told
    loader({"lengths": [window * (per_step - 1) + 1], **shape})  # just enough


@pytest.mark.parametrize("tokens", [0, 1])
def test_refuses_streams_that_predict_nothing(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"data: stream 1 has {tokens} tokens, which predict nothing"):
        PackedLoader([numbered(50), numbered(tokens)], 4, 1, seed=0)


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
        ({"weights": [1.0, 2.0]}, "2 weights for 1 streams; give one for each"),
        ({"weights": [0.0]}, r"weights = \[0.0\] must all be above 0"),
        ({"weights": [float("nan")]}, r"weights = \[nan\] must all be above 0"),
        ({"weights": [float("inf")]}, r"weights = \[inf\] must all be above 0"),
    ],
)
def test_refuses_bad_arguments(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"sequence_length": 2, "sequences_per_step": 4, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        PackedLoader(numbered(100), **arguments)


def test_refuses_foreign_states() -> None:
    shape: dict[str, Any] = {"lengths": [80, 40], "sequence_length": 4, "sequences_per_step": 2}
    source = loader(shape)
    source.next()
    good = source.state()
    swapped = numbered_streams([80, 40])
    swapped[1] = swapped[1][::-1].copy()
    others = {
        "tokens": loader(shape | {"lengths": [80, 41]}),
        "sequence_length": loader(shape | {"sequence_length": 5}),
        "seed": loader(shape, seed=1),
        "fingerprint": PackedLoader(swapped, 4, 2, seed=0),  # other text of the same size
        "weights": loader(shape | {"weights": [1, 2]}),
        "document_mask": loader(shape | {"document_mask": True}),
    }
    for name, other in others.items():
        if name == "document_mask":
            other._identity["fingerprint"] = good["fingerprint"]  # it stamps its own text
        with pytest.raises(ValueError, match=f"resume: the loader has {name} = .* and the checkpoint"):
            loader(shape).restore(other.state())
        untouched = loader(shape)
        with pytest.raises(ValueError, match="resume with the same data"):
            untouched.restore(other.state())
        assert same(untouched.next(), loader(shape).next())
    for windows in (-2, "2", 1.5, [], [-1], [1.5], [True], [1, 2], None):
        with pytest.raises(ValueError, match="resume: windows = "):
            loader(shape).restore({**good, "windows": windows})
    with pytest.raises(ValueError, match="resume: "):
        loader(shape).restore({})
    del good["windows"]
    with pytest.raises(ValueError, match="windows = None"):
        loader(shape).restore(good)


def test_the_state_of_another_mixture_is_foreign() -> None:
    shape: dict[str, Any] = {"lengths": [80, 40], "sequence_length": 4, "sequences_per_step": 2}
    state = loader(shape | {"weights": [1.0, 2.0]}).state()
    loader(shape | {"weights": [1, 2]}).restore(state)
    with pytest.raises(ValueError, match=r"weights = \[1.0, 2.5\] and the checkpoint \[1.0, 2.0\]"):
        loader(shape | {"weights": [1, 2.5]}).restore(state)


def test_a_large_stream_with_another_middle_is_foreign() -> None:
    """The fingerprint reads samples only, but from all over."""
    stream = np.zeros(1_000_000, dtype=np.uint16)
    other = stream.copy()
    other[400_000:600_000] = 1
    state = PackedLoader(stream, 128, 8, seed=0).state()
    with pytest.raises(ValueError, match="fingerprint"):
        PackedLoader(other, 128, 8, seed=0).restore(state)
