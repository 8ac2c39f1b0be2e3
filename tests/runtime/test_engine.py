from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE, exported, shared
from hypothesis import given, settings
from hypothesis import strategies as st

import mobilellm.runtime
from mobilellm.config import ModelConfig
from mobilellm.gguf_blocks import TYPES
from mobilellm.runtime import engine, native_library, reference, thread_choice
from mobilellm.runtime.cores import Cores
from mobilellm.runtime.kv_cache import CacheState

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)

TOKENS = np.random.default_rng(0).integers(3, 300, 90)
ODD = replace(  # rows that blocks do not divide, panels that rows do not fill, a group of three, heads of ten
    SHAPE, hidden_size=72, intermediate_size=172, num_heads=9, num_kv_heads=3, head_dim=10, vocab_size=323
)
LONG = replace(SHAPE, max_position_embeddings=600)  # several spans of attention, several passes


def logits(model: engine.NativeModel | reference.ReferenceModel, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return model.logits(model.forward(tokens, model.new_cache()))  # type: ignore[arg-type]


def assert_computes_the_same(file: Path, native: engine.NativeModel, blocks: bool) -> None:
    """Within rounding. Where inputs are rounded to 8 bits, another order of sums moves one in some ten tokens
    across a rounding, and all later ones with it: there, most of many short texts must agree.
    """
    readable = reference.load(file)
    texts = [TOKENS, *np.split(TOKENS, 30)]
    expected = [logits(readable, text) for text in texts]
    spread = expected[0].std()
    apart = [
        np.abs(logits(native, text) - right).max() / spread
        for text, right in zip(texts, expected, strict=True)
    ]
    assert max(apart) < (0.25 if blocks else 2e-3), apart
    assert np.median(apart[1:]) < (1e-5 if blocks else 1e-3), apart
    assert not np.allclose(expected[0], expected[0][0], rtol=0, atol=0.1)  # tokens make a difference at all


# The same numbers as the readable definition


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("config", [SHAPE, ODD], ids=["even", "odd"])
def test_it_computes_what_the_readable_definition_does(
    tmp_path: Path, kind: str, isa: str, config: ModelConfig
) -> None:
    file, _ = exported(tmp_path, kind, config)
    native = engine.load(file, 2, isa)
    assert native.isa == isa
    assert_computes_the_same(file, native, TYPES[kind].block > 1)


@pytest.mark.parametrize(
    "config",
    [
        replace(SHAPE, tie_word_embeddings=False),
        replace(SHAPE, num_kv_heads=4),
        replace(SHAPE, num_kv_heads=1),
        *(shared(order, repeats) for order in ("immediate", "all-over", "reverse") for repeats in (2, 3)),
    ],
)
def test_untied_and_shared_models_too(tmp_path: Path, config: ModelConfig) -> None:
    file, _ = exported(tmp_path, "F32", config)
    assert_computes_the_same(file, engine.load(file), blocks=False)


def test_head_and_blocks_of_different_types(tmp_path: Path) -> None:
    file, _ = exported(tmp_path / "a", "Q4_0", embedding_kind="Q8_0")
    assert_computes_the_same(file, engine.load(file), blocks=True)
    file, _ = exported(tmp_path / "b", "BF16", embedding_kind="Q4_0")
    assert_computes_the_same(file, engine.load(file), blocks=True)


def test_greedy_text_is_that_of_the_readable_definition(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32", replace(SHAPE, max_position_embeddings=160))
    ours = mobilellm.runtime.load(file, engine="native")
    theirs = mobilellm.runtime.load(file, engine="reference")
    assert isinstance(ours.engine, engine.NativeModel)
    assert isinstance(theirs.engine, reference.ReferenceModel)
    prompts = [[1, 7, 8], [1], [1, *range(20, 60)]]
    tokens = [[each.token for each in model.generate_tokens(prompts, None, 100)] for model in (ours, theirs)]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) > 100


def test_float16_is_rounded_as_numpy_does(tmp_path: Path) -> None:
    edges = np.array(
        [0, 1e-8, 2.98e-8, 3e-8, 6e-8, 6.1e-5, 6.09e-5, 1 + 2**-11, 1 + 3 * 2**-11, 65519, 7e4, 1e-30]
    )
    values = np.concatenate([edges, -edges, np.random.default_rng(0).normal(size=40)]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    library = native_library.load()
    assert isinstance(library, native_library.Library)
    for isa in engine.instruction_sets():
        found = np.array([library.half(isa.encode(), float(value)) for value in values])
        np.testing.assert_array_equal(found, expected)


# The same bits, however it is fed


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("config", [LONG, ODD], ids=["long", "odd"])
def test_threads_and_chunks_change_no_bit(tmp_path: Path, kind: str, config: ModelConfig) -> None:
    file, _ = exported(tmp_path, kind, config)
    tokens = np.random.default_rng(1).integers(3, 300, config.max_position_embeddings)
    whole = None
    for threads in (1, 2, 3):
        native = engine.load(file, threads)
        states = native.forward(tokens, native.new_cache())
        whole = states if whole is None else whole
        np.testing.assert_array_equal(states, whole)
        np.testing.assert_array_equal(native.logits(states[:7]), native.logits(states)[:7])
        cache = native.new_cache()
        parts = [native.forward(part, cache) for part in np.split(tokens, [1, 2, 4, 9, 26, 59])]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_threads_that_change_from_pass_to_pass_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = exported(tmp_path, "Q8_0", SHAPE)
    expected = logits(engine.load(file, 1))
    monkeypatch.setattr(thread_choice, "cores", lambda: Cores(fast=2, usable=4))
    native, tried = engine.load(file), set()
    for _ in range(2):
        cache = native.new_cache()
        for token, right in zip(TOKENS, expected, strict=True):
            tried.add(native.threads)
            np.testing.assert_array_equal(native.logits(native.forward(token[None], cache))[0], right)
    assert {1, 2, 3} <= tried <= {1, 2, 3, 4}
    np.testing.assert_array_equal(logits(native), expected)


def test_threads_that_are_named_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = engine.load(exported(tmp_path, "F32")[0], 1)
    before = threading_count()
    native.use_threads(3)
    assert (native.threads, threading_count()) == (3, before + 2)
    native.use_threads(2)
    assert {native.threads for _ in range(100) if native.forward(TOKENS[:1], native.new_cache()).any()} == {2}
    with pytest.raises(ValueError, match="threads = 257 must lie in 1 … 256"):
        native.use_threads(257)
    monkeypatch.setattr(native.library, "use_threads", lambda *_: native_library.REFUSED)
    with pytest.raises(ValueError, match="threads = 4 could not be started; take fewer"):
        native.use_threads(4)
    assert native.threads == 2


def test_threads_that_cannot_be_started_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_choice, "cores", lambda: Cores(fast=8, usable=8))
    native = engine.load(exported(tmp_path, "F32")[0])
    monkeypatch.setattr(native.library, "use_threads", lambda *_: native_library.REFUSED)
    before = threading_count()
    for _ in range(100):
        native.forward(TOKENS[:20], native.new_cache())
        native.forward(TOKENS[:1], native.new_cache())
    assert threading_count() == before


def test_a_model_loads_without_threads_that_nobody_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = exported(tmp_path, "F32")
    monkeypatch.setattr(thread_choice, "cores", lambda: Cores(fast=8, usable=8))
    library = native_library.load()
    assert not isinstance(library, str)
    monkeypatch.setattr(library, "use_threads", lambda *_: native_library.REFUSED)
    before = threading_count()
    native = engine.load(file)
    assert threading_count() == before
    np.testing.assert_array_equal(logits(native), logits(engine.load(file, 1)))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_chunks_change_no_bit_with_any_instruction_set(tmp_path: Path, kind: str, isa: str) -> None:
    """Tiles of every size that these kernels have."""
    file, _ = exported(tmp_path, kind, ODD)
    native = engine.load(file, 2, isa)
    whole = native.forward(TOKENS[:60], native.new_cache())
    cache = native.new_cache()
    parts = [native.forward(part, cache) for part in np.split(TOKENS[:60], [1, 3, 6, 10, 15, 22, 30, 43])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(("order", "repeats"), [("immediate", 2), ("immediate", 3), ("reverse", 2)])
def test_a_shared_model_is_its_unrolled_one(tmp_path: Path, kind: str, order: str, repeats: int) -> None:
    config = shared(order, repeats)
    file, _ = exported(tmp_path / "shared", kind, config)
    unrolled, _ = exported(tmp_path / "unrolled", kind, config, unroll=True)
    once, twice = engine.load(file, 2), engine.load(unrolled, 2)
    assert twice.arena_bytes > 1.5 * once.arena_bytes
    np.testing.assert_array_equal(logits(once), logits(twice))
    caches = once.new_cache(), twice.new_cache()
    for token in TOKENS[:20, None]:
        states = [model.forward(token, cache) for model, cache in zip((once, twice), caches, strict=True)]
        np.testing.assert_array_equal(*states)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> engine.NativeModel:
    return engine.load(exported(tmp_path_factory.mktemp("small"), "Q8_0")[0], 2)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_several_sequences_in_a_batch_are_each_alone(
    small_model: engine.NativeModel, data: st.DataObject
) -> None:
    """Any number of sequences, fed any numbers of tokens side by side in any rounds."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    count = data.draw(st.integers(1, 7))
    sequences = [rng.integers(3, 300, data.draw(st.integers(1, 60))) for _ in range(count)]
    caches = [small_model.new_cache(len(tokens)) for tokens in sequences]
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    while any(cache.length < cache.capacity for cache in caches):
        live = [index for index, cache in enumerate(caches) if cache.length < cache.capacity]
        chosen = data.draw(st.lists(st.sampled_from(live), min_size=1, unique=True))
        feeds = []
        for index in chosen:
            left = caches[index].capacity - caches[index].length
            tokens = sequences[index][caches[index].length :][: data.draw(st.integers(1, left))]
            feeds.append((tokens, caches[index]))
        states = np.split(
            small_model.forward_batch(feeds), np.cumsum([len(tokens) for tokens, _ in feeds])[:-1]
        )
        for index, its_states in zip(chosen, states, strict=True):
            found[index].append(its_states)
    for tokens, its_states in zip(sequences, found, strict=True):
        alone = small_model.forward(tokens, small_model.new_cache())
        np.testing.assert_array_equal(np.concatenate(its_states), alone)


def test_a_cache_cut_back_goes_on_as_if_nothing_had_been(small_model: engine.NativeModel) -> None:
    cache = small_model.new_cache()
    whole = small_model.forward(TOKENS, cache)
    for length in (70, 33, 32, 0):
        cache.truncate(length)
        small_model.forward(TOKENS[::-1][:9], cache)
        cache.truncate(length)
        np.testing.assert_array_equal(small_model.forward(TOKENS[length:], cache), whole[length:])
    with pytest.raises(ValueError, match="cannot truncate a cache of 90 tokens to 91"):
        cache.truncate(91)


def test_a_state_goes_on_in_another_cache(small_model: engine.NativeModel) -> None:
    whole = small_model.forward(TOKENS, small_model.new_cache())
    cache, other = small_model.new_cache(), small_model.new_cache()
    small_model.forward(TOKENS[:37], cache)
    other.restore(cache.state())
    np.testing.assert_array_equal(small_model.forward(TOKENS[37:], other), whole[37:])
    np.testing.assert_array_equal(small_model.forward(TOKENS[37:], cache), whole[37:])
    with pytest.raises(ValueError, match="a state of 90 tokens does not fit a cache of 89"):
        small_model.new_cache(89).restore(cache.state())
    with pytest.raises(ValueError, match="is not this model's"):
        other.restore(CacheState(*(each[:2] for each in cache.state())))


def test_a_state_of_the_readable_definition_goes_on_here(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32", ODD)
    native, readable = engine.load(file), reference.load(file)
    ours, theirs = native.new_cache(), readable.new_cache()
    native.forward(TOKENS[:50], ours)
    readable.forward(TOKENS[:50], theirs)
    for mine, right in zip(ours.state(), theirs.state(), strict=True):
        np.testing.assert_allclose(mine.astype(np.float32), right.astype(np.float32), rtol=2e-3, atol=2e-3)
    expected = readable.forward(TOKENS[50:], theirs)
    theirs.truncate(50)
    ours.restore(theirs.state())
    np.testing.assert_allclose(native.forward(TOKENS[50:], ours), expected, rtol=0, atol=5e-3)


def test_one_model_serves_several_threads(small_model: engine.NativeModel) -> None:
    expected = logits(small_model)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(logits(small_model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, expected)


# What is refused


def test_what_cannot_be_fed_is_refused_and_nothing_is_written(small_model: engine.NativeModel) -> None:
    cache, other = small_model.new_cache(4), small_model.new_cache(4)
    with pytest.raises(ValueError, match="0 of 4 tokens and cannot take 5 more"):
        small_model.forward_batch([(TOKENS[:2], other), (TOKENS[:5], cache)])
    for bad in (320, -1):
        with pytest.raises(ValueError, match="not in the vocabulary of 320"):
            small_model.forward(np.array([bad]), cache)
    with pytest.raises(ValueError, match="not empty"):
        small_model.forward(np.array([], dtype=np.int64), cache)
    with pytest.raises(ValueError, match="no sequence"):
        small_model.forward_batch([])
    with pytest.raises(ValueError, match="1 … 96, the context"):
        small_model.new_cache(97)
    with pytest.raises(ValueError, match="twice"):
        small_model.forward_batch([(TOKENS[:1], cache), (TOKENS[:1], cache)])
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(T, 64\)"):
        small_model.logits(np.zeros((2, 3), np.float32))
    assert cache.length == other.length == 0
    small_model.forward(TOKENS[:4], cache)


def test_a_cache_of_another_model_is_refused(tmp_path: Path, small_model: engine.NativeModel) -> None:
    other = engine.load(exported(tmp_path, "F32")[0], 1)
    with pytest.raises(ValueError, match="made by another model"):
        other.forward(TOKENS[:1], small_model.new_cache())


def test_settings_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = exported(tmp_path, "F32")
    with pytest.raises(ValueError, match="threads = 0 must lie in 1 … 256"):
        engine.load(file, 0)
    with pytest.raises(ValueError, match="engine = 'fast' is not known"):
        mobilellm.runtime.load(file, engine="fast")  # type: ignore[arg-type]
    monkeypatch.setenv(engine.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match=r"'mmx' \(MOBILELLM_ISA\) is not known; choose scalar or avx2"):
        engine.load(file)
    monkeypatch.setenv(engine.ISA_VARIABLE, "scalar")
    assert engine.load(file).isa == "scalar"


def test_without_a_compiler_the_readable_definition_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = exported(tmp_path, "F32")
    monkeypatch.setattr(native_library, "load", lambda: "there is no compiler")
    said: list[str] = []
    model = mobilellm.runtime.load(file, say=said.append)
    assert isinstance(model.engine, reference.ReferenceModel)
    assert said == [
        "the native engine was not compiled (there is no compiler); the model runs in numpy, many times slower"
    ]
    with pytest.raises(ValueError, match="not compiled: there is no compiler; use engine='reference'"):
        mobilellm.runtime.load(file, engine="native")


def test_a_closed_model_is_refused_and_its_memory_comes_back(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    native = engine.load(file, 2)
    cache = native.new_cache()
    native.close()
    native.close()
    native.cancel()
    with pytest.raises(ValueError, match="was closed"):
        native.forward(TOKENS, cache)
    gc.collect()  # models that earlier tests left
    before = threading_count()
    models = [engine.load(file, 3) for _ in range(5)]
    assert threading_count() == before + 10
    del models
    gc.collect()
    assert threading_count() == before


def threading_count() -> int:
    """Threads of this process, those of C++ too."""
    return len(os.listdir("/proc/self/task"))


def test_a_fork_after_loading_is_refused_in_words(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    code = f"""
import os, sys, numpy as np
from mobilellm.runtime import engine
model = engine.load({str(file)!r}, 2)
cache = model.new_cache()
model.forward(np.array([5]), cache)
child = os.fork()
if child == 0:
    try:
        model.forward(np.array([5]), cache)
    except ValueError as error:
        again = engine.load({str(file)!r}, 2)
        again.forward(np.array([5]), again.new_cache())
        del model, cache, again
        os._exit(7 if "load it in this process" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
model.forward(np.array([5]), cache)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=300, check=False)
    assert done.returncode == 0


def test_another_thread_cancels_a_call_within_a_pass(tmp_path: Path) -> None:
    """The last step's keys were not written: a pass that had run to its end would have written all."""
    long = replace(SHAPE, num_layers=12, max_position_embeddings=8192)
    native = engine.load(exported(tmp_path, "F32", long)[0], 2, "scalar")
    tokens = np.resize(TOKENS, 256)  # of one pass
    done = threading.Event()

    def cancel() -> None:
        while not done.wait(0.001):
            native.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        for _ in range(100):  # on a busy machine the other thread may come too late
            cache = native.new_cache(len(tokens))
            try:
                native.forward(tokens, cache)
            except engine.CancelledError:
                assert cache.length == 0
                written = keys_written(native, cache, len(tokens))
                if written[0] and not written[-1]:
                    break
        else:
            pytest.fail("no pass was left before its last step")
    finally:
        done.set()
        thread.join()
    native.cancel()  # nothing runs: nothing happens
    alone = native.forward(tokens[:40], cache)
    np.testing.assert_array_equal(alone, native.forward(tokens[:40], native.new_cache()))


def keys_written(native: engine.NativeModel, cache: engine.NativeCache, tokens: int) -> np.ndarray:
    """Of every step (steps,): whether there are keys of so many tokens, whatever the cache's length."""
    state = cache.empty_state(tokens)
    native.library.sequence_read(cache.handle, tokens, *(array.ctypes.data for array in state))
    return state.keys.any(axis=(1, 2, 3))


# Memory


def test_memory_is_the_file_once_and_a_little_more(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32", replace(SHAPE, hidden_size=256, intermediate_size=2048, num_layers=6))
    size = file.stat().st_size
    code = f"""
import re
from mobilellm.gguf import read_gguf
from mobilellm.runtime import engine
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
engine.missing()
before = peak()
model = engine.load({str(file)!r}, 2)
print(peak() - before, model.arena_bytes)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    grown, arena = map(int, said.split())
    assert size > 35e6
    assert 0.95 * size < arena < 1.05 * size
    assert grown < arena + 12e6  # a block of the file at a time, and room for a batch


SANITIZED = """
import dataclasses, sys
import numpy as np
from mobilellm.gguf import read_gguf
from mobilellm.runtime import engine, native_library
flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
recipe = native_library.recipe()
recipe = dataclasses.replace(
    recipe, flags=(*recipe.flags, *flags), link_flags=(*recipe.link_flags, *flags)
)
native_library.recipe = lambda: recipe
for path in sys.argv[1:]:
    damaged = path + ".damaged"
    raw = bytearray(open(path, "rb").read())
    start = min(each.offset for each in read_gguf(path).tensors.values())
    raw[start:] = np.random.default_rng(0).bytes(len(raw) - start)
    open(damaged, "wb").write(raw)
    for path, isa in ((path, "scalar"), (path, engine.load(path).isa), (damaged, "scalar"), (damaged, "")):
        model = engine.load(path, 2, isa)
        caches = [model.new_cache(96) for _ in range(3)]
        tokens = np.arange(3, 99)
        model.logits(model.forward(tokens, caches[0]))
        caches[2].restore(caches[0].state())
        caches[2].truncate(0)
        for count in (1, 2, 5, 20, 66):
            model.logits(model.forward_batch([(tokens[:count], caches[1]), (tokens[:1], caches[2])]))
        model.close()
print("no fault found")
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    files = [
        str(exported(tmp_path / f"{kind}{index}", kind, config)[0])
        for kind in TYPES
        for index, config in enumerate([SHAPE, ODD])
    ]
    runtime = subprocess.run(
        [os.environ.get("CXX", "c++"), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    environment = {
        **os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "no fault found\n", done.stderr[-3000:]
