"""Keys and values in 8 bits: what is rounded, that the engine computes it, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE, exported
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mobilellm.runtime
from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import TYPES
from mobilellm.runtime import engine, reference
from mobilellm.runtime.batch import ContinuousBatch
from mobilellm.runtime.kv_cache import (
    KV_CACHE_TYPES,
    CacheState,
    KVCache,
    Room,
    bytes_per_token,
    check_cache_type,
    numbers_of,
    rounded,
)
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Sampling

HEADS = replace(SHAPE, head_dim=64, max_position_embeddings=300)
"""Heads of two runs, and a context of several spans."""
TOKENS = np.random.default_rng(0).integers(3, 300, 300)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=4)
needs_engine = pytest.mark.skipif(engine.missing() is not None, reason="the native engine was not compiled")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("heads"), "Q8_0", HEADS)[0]


@pytest.fixture(scope="module", params=["native", "reference"])
def model(request: pytest.FixtureRequest, file: Path) -> RuntimeModel:
    if request.param == "native" and (fault := engine.missing()) is not None:
        pytest.skip(f"the native engine was not compiled: {fault}")
    return mobilellm.runtime.load(file, engine=request.param, kv_cache="q8_0")


def test_room_for_a_sequence() -> None:
    room = Room(HEADS, 8)
    refused: list[tuple[list, str]] = [
        ([], r"shape \(0,\)"), ([[1, 2]], r"shape \(1, 2\)"), ([-1, 2], "token ids -1 … 2 are not in"),
        ([5, 300], "not in the vocabulary of 300"), ([1] * 9, "holds 0 of 8 tokens and cannot take 9 more"),
    ]  # fmt: skip
    for tokens, told in refused:
        with pytest.raises(ValueError, match=told):
            room.reserve(np.array(tokens, dtype=np.int64), 300)
    room.reserve(np.array([0, 299] * 4), 300)
    room.length = 8
    for length in (-1, 9):
        with pytest.raises(ValueError, match=f"cannot truncate a cache of 8 tokens to {length}"):
            room.truncate(length)
    for length in (8, 3, 0):
        room.truncate(length)
        assert room.length == length
    for capacity in (0, 301):
        with pytest.raises(
            ValueError, match=f"a cache of {capacity} tokens must lie in 1 … 300, the context"
        ):
            Room(HEADS, capacity)


# What is kept


@given(arrays(np.float32, (3, 2, 64), elements=st.floats(-1e4, 1e4, width=32)))
def test_a_number_is_kept_within_half_a_step(numbers: np.ndarray) -> None:
    kept = rounded("q8_0", numbers)
    assert kept.shape == (3, 2, 68)
    runs = numbers.reshape(-1, 32)
    steps = np.abs(runs).max(axis=1, keepdims=True) / 127
    apart = np.abs(numbers_of("q8_0", kept).reshape(-1, 32) - runs)
    # Half a step, and the scale's own rounding: 2^-11 of 127 steps, or what the smallest float16 are apart.
    assert (apart <= steps * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25 + 1e-30).all()


def test_runs_are_blocks_of_q8_0() -> None:
    numbers = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    np.testing.assert_array_equal(rounded("q8_0", numbers).reshape(-1), TYPES["Q8_0"].encode(numbers))


def test_halves_go_to_the_even_number_and_nothing_stays_nothing() -> None:
    numbers = np.zeros((2, 32), np.float32)
    numbers[0, :4] = 127, 0.5, 1.5, -2.5
    codes = rounded("q8_0", numbers)[:, 2:].view(np.int8)
    assert codes[0, :4].tolist() == [127, 0, 2, -2]
    assert not codes[1].any()


@pytest.mark.parametrize("fault", [np.inf, -np.inf, np.nan, 1e7])
def test_a_run_with_what_is_no_number_stays_none(fault: float) -> None:
    numbers = np.ones((3, 32), np.float32)
    numbers[1, 7] = fault
    kept = numbers_of("q8_0", rounded("q8_0", numbers))
    assert np.isnan(kept[1]).all()
    np.testing.assert_allclose(kept[[0, 2]], 1, rtol=1e-3)


def test_a_token_takes_17_of_32_bytes() -> None:
    assert bytes_per_token("q8_0", HEADS) * 32 == bytes_per_token("f16", HEADS) * 17


# What is computed


@needs_engine
@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_the_engine_computes_what_the_readable_definition_does(
    tmp_path: Path, isa: str, head_dim: int
) -> None:
    """A number of a query or key that lies on a rounding's edge may fall to either side: within a tenth of what
    8 bits themselves change, and much less in most tokens."""
    path, _ = exported(tmp_path, "F32", replace(HEADS, head_dim=head_dim))
    native = engine.load(path, 2, isa, "q8_0")
    whole, plain = reference.load(path, "q8_0"), reference.load(path)
    right, without, found = (
        each.logits(each.forward(TOKENS, each.new_cache()))  # type: ignore[arg-type]
        for each in (whole, plain, native)
    )
    spread = right.std()
    apart = np.abs(found - right).max(axis=1) / spread
    assert apart.max() < 0.02
    assert np.median(apart) < 4e-3
    assert 0.02 < np.abs(without - right).max() / spread < 0.2


@needs_engine
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_threads_and_chunks_change_no_bit(tmp_path: Path, isa: str, kind: str) -> None:
    path, _ = exported(tmp_path, kind, replace(HEADS, num_heads=9, num_kv_heads=3, head_dim=32))
    states = None
    for threads in (1, 2, 3):
        native = engine.load(path, threads, isa, "q8_0")
        whole = native.forward(TOKENS, native.new_cache())
        states = whole if states is None else states
        np.testing.assert_array_equal(whole, states)
        cache = native.new_cache()
        parts = [native.forward(part, cache) for part in np.split(TOKENS, [1, 2, 4, 9, 26, 59, 130, 150])]
        np.testing.assert_array_equal(np.concatenate(parts), states)


@needs_engine
def test_the_same_with_a_cache_in_float16(file: Path) -> None:
    """It is the default."""
    one, other = engine.load(file), engine.load(file, kv_cache="f16")
    np.testing.assert_array_equal(
        one.forward(TOKENS, one.new_cache()), other.forward(TOKENS, other.new_cache())
    )
    assert one.kv_cache == "f16"


@needs_engine
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_several_sequences_in_a_batch_are_each_alone(native: engine.NativeModel, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sequences = [
        rng.integers(3, 300, data.draw(st.integers(1, 200))) for _ in range(data.draw(st.integers(1, 5)))
    ]
    caches = [native.new_cache(len(tokens)) for tokens in sequences]
    cuts = [data.draw(st.integers(0, len(tokens))) for tokens in sequences]
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    for pieces in (
        [t[:cut] for t, cut in zip(sequences, cuts, strict=True)],
        [t[cut:] for t, cut in zip(sequences, cuts, strict=True)],
    ):
        live = [index for index, piece in enumerate(pieces) if len(piece)]
        if not live:
            continue
        states = native.forward_batch([(pieces[index], caches[index]) for index in live])
        ends = np.cumsum([len(pieces[index]) for index in live])[:-1]
        for index, its_states in zip(live, np.split(states, ends), strict=True):
            found[index].append(its_states)
    for tokens, its_states in zip(sequences, found, strict=True):
        alone = native.forward(tokens, native.new_cache())
        np.testing.assert_array_equal(np.concatenate(its_states), alone)


@pytest.fixture(scope="module")
def native(file: Path) -> engine.NativeModel:
    return engine.load(file, 2, kv_cache="q8_0")


@needs_engine
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("fault", [np.inf, np.nan, 1e12])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_damaged_weight_is_told_when_a_token_is_drawn(
    tmp_path: Path, isa: str, which: str, fault: float
) -> None:
    """In either engine and in either type of cache: what follows are no numbers."""
    path, _ = exported(tmp_path, "F32", replace(SHAPE, head_dim=32))
    weight = read_gguf(path).tensors[f"blk.0.attn_{which}.weight"]
    with path.open("r+b") as open_file:
        open_file.seek(weight.offset)
        open_file.write(np.float32(fault).tobytes())
    models = [engine.load(path, 2, isa, kind) for kind in KV_CACHE_TYPES]
    kept = []
    for each in (*models, *(reference.load(path, kind) for kind in KV_CACHE_TYPES)):
        cache = each.new_cache()
        logits = each.logits(each.forward(TOKENS[:20], cache))  # type: ignore[arg-type]
        assert np.isnan(logits).all()
        kept.append(cache.state())
    for ours, right in zip(kept[1], kept[3], strict=True):  # in q8_0: from the first step on that was damaged
        np.testing.assert_array_equal(ours[1:], right[1:])
    with pytest.raises(ValueError, match="the logits hold nan: the model's arithmetic overflowed or its"):
        mobilellm.runtime.load(path, kv_cache="q8_0").generate("some words")


# Text


def test_text_in_a_batch_alone_and_in_a_session_is_the_same(model: RuntimeModel) -> None:
    prompts = ["some words", "and more words of all kinds to read", "pieces"]
    alone = [model.generate(prompt, SAMPLED, 40)[0] for prompt in prompts]
    session = model.session()
    assert [session.generate(prompt, SAMPLED, 40) for prompt in prompts] == alone
    with ContinuousBatch(model, slots=2) as batch:
        requests = [batch.add(prompt, SAMPLED, 40) for prompt in prompts]
        assert [request.result() for request in requests] == alone


def test_a_session_goes_on_from_its_file(model: RuntimeModel, tmp_path: Path) -> None:
    session, other = model.session(), model.session()
    text = "some words to go on with"
    session.generate(text, SAMPLED, 20)
    session.save(tmp_path / "kept")
    other.restore(tmp_path / "kept")
    for ours, theirs in zip(other._held.cache.state(), session._held.cache.state(), strict=True):
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)
    assert (
        other.generate(text + " and more", SAMPLED, 20) == model.generate(text + " and more", SAMPLED, 20)[0]
    )
    assert other.usage is not None
    assert other.usage.reused > 2


def test_a_session_of_the_other_type_is_refused(model: RuntimeModel, file: Path, tmp_path: Path) -> None:
    kept, plain = tmp_path / "kept", mobilellm.runtime.load(file)
    for saver, reader, types in ((model, plain, ("q8_0", "f16")), (plain, model, ("f16", "q8_0"))):
        session = saver.session()
        session.generate("some words", max_new_tokens=3)
        session.save(kept)
        with pytest.raises(ValueError) as refused:
            reader.session().restore(kept)
        assert str(refused.value) == (
            f"{kept}: was saved with keys and values in {types[0]}, and this model keeps them in {types[1]}; load "
            f"it with kv_cache = {types[0]!r} (--kv-cache {types[0]}), or save a session of its own"
        )


def test_a_state_of_the_other_type_is_refused(model: RuntimeModel, file: Path) -> None:
    ours, theirs = model.engine.new_cache(), reference.load(file).new_cache()
    assert isinstance(ours, KVCache)
    wide = CacheState(*(each.astype(np.float32) for each in theirs.state()))
    for into, state, told in (
        (ours, theirs.state(), "float16 is of a cache in f16"),
        (theirs, ours.state(), "uint8 is of a cache in q8_0"),
        (theirs, wide, "of float32 and float32 is none of a cache in f16; expected float16"),
    ):
        with pytest.raises(ValueError, match=told):
            into.restore(state)


@needs_engine
def test_either_engine_goes_on_with_the_other_s_state(file: Path, native: engine.NativeModel) -> None:
    readable = reference.load(file, "q8_0")
    ours, theirs = native.new_cache(), readable.new_cache()
    native.forward(TOKENS[:150], ours)
    theirs.restore(ours.state())
    for one, other in zip(ours.state(), theirs.state(), strict=True):
        np.testing.assert_array_equal(one, other)
    found, right = native.forward(TOKENS[150:160], ours), readable.forward(TOKENS[150:160], theirs)
    assert np.median(np.abs(found - right).max(axis=1)) < 0.2
    ours.truncate(150)
    ours.restore(theirs.state())
    assert ours.length == 160


# What is refused


def test_a_type_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path, _ = exported(tmp_path, "F32")  # heads of 16
    for name in ("native", "reference"):
        if name == "native" and engine.missing() is not None:
            continue
        with pytest.raises(
            ValueError, match=r"runs of 32 numbers, which do not divide .* heads of 16; choose f16"
        ):
            mobilellm.runtime.load(path, engine=name, kv_cache="q8_0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_cache = 'q4_0' is not known; choose f16 or q8_0"):
        check_cache_type("q4_0", HEADS)
