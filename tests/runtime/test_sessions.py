"""Sessions: only what is new is computed, what comes out is the same, and it can be kept, cancelled, slid."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ENGINES, counted, opened
from safetensors.numpy import load_file, save_file

from mobilellm.runtime import Decoding
from mobilellm.runtime.session import RuntimeModel, Session
from mobilellm.sampling import Sampling

SAMPLED = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=5)
CHAT = [
    "some words to learn",
    "some words to learn pieces from, and some more",
    "some words to learn pieces from, and other words of all kinds",
    "to begin anew",
]


@pytest.fixture(scope="module", params=ENGINES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RuntimeModel:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


# Only what is new is computed


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_growing_text_costs_what_is_new_and_comes_out_the_same(
    model: RuntimeModel, sampling: Sampling
) -> None:
    counting, engine = counted(model)
    session = counting.session()
    held: list[int] = []
    for prompt in CHAT:
        tokens = model.tokenizer.encode(prompt)
        before = engine.fed
        completion = session.generate(prompt, sampling, 10)
        assert completion == model.generate(prompt, sampling, 10)[0]
        shared = common(held, tokens[:-1])
        assert engine.fed - before == len(tokens) - shared + len(completion.tokens) - 1
        assert session.usage is not None
        assert (session.usage.reused, session.usage.fed) == (shared, engine.fed - before)
        held = tokens + completion.tokens[:-1]
        assert session.tokens == held
    assert common(*(model.tokenizer.encode(text) for text in CHAT[1:3])) > 10


def test_the_same_prompt_again_costs_one_token(model: RuntimeModel) -> None:
    counting, engine = counted(model)
    session = counting.session()
    first = session.generate(CHAT[1], SAMPLED, 1)
    before = engine.fed
    assert session.generate(CHAT[1], SAMPLED, 1) == first
    assert engine.fed - before == 1


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_prompts_one_after_the_other_are_each_alone(model: RuntimeModel, data: st.DataObject) -> None:
    session = model.session()
    for _ in range(data.draw(st.integers(1, 4))):
        kept = data.draw(st.integers(0, len(session.tokens)))
        prompt = session.tokens[:kept] + data.draw(
            st.lists(st.sampled_from(range(300, 306)), min_size=1, max_size=4)
        )
        prompt = prompt[-80:]
        expected = [new.token for new in model.generate_tokens([prompt], SAMPLED, 4)]
        taken = [new.token for new in session.generate_tokens(prompt, SAMPLED, 4)]
        assert taken == expected


def test_a_stream_left_early_leaves_the_session_in_order(model: RuntimeModel) -> None:
    session = model.session()
    for piece in session.stream(CHAT[0], max_new_tokens=10):
        if piece.token is not None:
            break
    older = session.stream(CHAT[0], max_new_tokens=10)
    next(older)
    assert session.generate(CHAT[1], max_new_tokens=5) == model.generate(CHAT[1], max_new_tokens=5)[0]
    assert [piece.finish for piece in older] == ["cancelled"]  # a new generation ended it


def test_a_full_context_ends_a_session_s_answer_and_is_kept(model: RuntimeModel) -> None:
    session = model.session()
    completion = session.generate(CHAT[0], Sampling(temperature=1.5, seed=1))
    assert completion.finish == "context"
    assert len(session.tokens) == SHAPE.max_position_embeddings - 1  # the last one drawn is never read
    assert session.generate(CHAT[0], max_new_tokens=3) == model.generate(CHAT[0], max_new_tokens=3)[0]


def common(first: list[int], second: list[int]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count


# Kept in a file


def test_a_session_goes_on_from_its_file_bit_by_bit(model: RuntimeModel, tmp_path: Path) -> None:
    counting, engine = counted(model)
    session, file = counting.session(), tmp_path / "chat.session"
    session.generate(CHAT[1], SAMPLED, 10)
    session.save(file)
    expected_state = session._held.cache.state()
    text = session.generate(CHAT[1] + CHAT[2], SAMPLED, 10)
    restored = counting.session()
    restored.generate("something else", max_new_tokens=2)
    restored.restore(file)
    for ours, theirs in zip(restored._held.cache.state(), expected_state, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    before = engine.fed
    assert restored.generate(CHAT[1] + CHAT[2], SAMPLED, 10) == text
    assert restored.usage == session.usage
    assert engine.fed - before < len(model.tokenizer.encode(CHAT[1] + CHAT[2])) + 9
    assert [path.name for path in tmp_path.iterdir()] == ["chat.session"]


def test_an_empty_session_can_be_kept_too(model: RuntimeModel, tmp_path: Path) -> None:
    model.session().save(tmp_path / "empty")
    session = model.session()
    session.generate(CHAT[0], max_new_tokens=2)
    session.restore(tmp_path / "empty")
    assert session.tokens == []


def test_what_an_interrupt_left_unnoted_is_not_kept(model: RuntimeModel, tmp_path: Path) -> None:
    """A Ctrl-C may come when the cache has grown and the session does not know it yet."""
    session, other = model.session(), model.session()
    session.generate(CHAT[0], max_new_tokens=3)
    model.engine.forward(np.array([5, 6]), session._held.cache)
    session.save(tmp_path / "chat")
    other.restore(tmp_path / "chat")
    assert other.generate(CHAT[1], SAMPLED, 5) == model.generate(CHAT[1], SAMPLED, 5)[0]
    assert session.generate(CHAT[1], SAMPLED, 5) == model.generate(CHAT[1], SAMPLED, 5)[0]


def test_a_model_of_another_kind_of_file_keeps_no_session(model: RuntimeModel, tmp_path: Path) -> None:
    session = replace(model, file=None).session()
    for keep in (session.save, session.restore):
        with pytest.raises(ValueError, match="sessions are kept for .gguf files alone"):
            keep(tmp_path / "chat")


@pytest.fixture
def saved(model: RuntimeModel, tmp_path: Path) -> Path:
    session = model.session()
    session.generate(CHAT[1], max_new_tokens=5)
    session.save(tmp_path / "chat.session")
    return tmp_path / "chat.session"


def test_another_model_s_session_is_refused(model: RuntimeModel, saved: Path, tmp_path: Path) -> None:
    kind = "Q4_0"  # the same shape, other numbers
    other = opened(tmp_path / "other", "reference", kind=kind).session()
    assert refusal(other, saved) == (
        f"{saved}: was saved with another model than this one; save a session of its own"
    )


def test_a_damaged_session_is_refused(model: RuntimeModel, saved: Path) -> None:
    session, whole = model.session(), saved.read_bytes()
    with pytest.raises(FileNotFoundError, match="nothing: no such session file"):
        session.restore(saved.with_name("nothing"))
    for length in (0, 5, 100, len(whole) - 1):
        saved.write_bytes(whole[:length])
        assert f"{saved}: is no session file, or cut off (" in refusal(session, saved)
    for place in (len(whole) - 1, len(whole) - 3000):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert "is damaged: its numbers are not those that were saved" in refusal(session, saved)
    saved.write_bytes(np.random.default_rng(0).bytes(3000))
    assert "is no session file" in refusal(session, saved)
    save_file({"tokens": np.zeros(3, np.int32)}, saved)
    assert "is no session file of this version" in refusal(session, saved)
    assert session.tokens == []


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_no_flipped_bit_is_taken_for_what_was_saved(
    model: RuntimeModel, place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Refused with one line, or (in the names of things, say) the same numbers."""
    file = tmp_path_factory.getbasetemp() / "flipped.session"
    session = model.session()
    session.generate_tokens([1, 300], max_new_tokens=1)
    list(session.generate_tokens([1, 300], max_new_tokens=1))
    session.save(file)
    data = bytearray(file.read_bytes())
    data[place % min(len(data), 900)] ^= 1 << bit
    file.write_bytes(data)
    other = model.session()
    said = ""
    try:
        other.restore(file)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert other.tokens == ([] if said else session.tokens)


def test_what_was_saved_can_be_looked_at(saved: Path, model: RuntimeModel) -> None:
    arrays = load_file(saved)
    assert {name: (array.dtype, array.ndim) for name, array in arrays.items()} == {
        "tokens": (np.int32, 1), "keys": (np.float16, 4), "values": (np.float16, 4)
    }  # fmt: skip


def refusal(session: Session, file: Path) -> str:
    with pytest.raises(ValueError) as error:
        session.restore(file)
    assert "\n" not in str(error.value)
    return str(error.value)


# Cancelled from another thread


def test_another_thread_ends_a_generation_and_the_session_goes_on(model: RuntimeModel) -> None:
    session = model.session()
    whole = model.generate(CHAT[0], Sampling(temperature=1.5, seed=1))[0]
    shown: list[str] = []
    finish = None
    for piece in session.stream(CHAT[0], Sampling(temperature=1.5, seed=1)):
        shown.append(piece.text)
        finish = piece.finish
        if len(shown) == 10:
            thread = threading.Thread(target=session.cancel)
            thread.start()
            thread.join()
    assert finish == "cancelled"
    assert len(shown) == 11  # ten tokens, and the word that it ended
    assert whole.text.startswith("".join(shown).removesuffix("\ufffd"))
    assert session.generate(CHAT[0], max_new_tokens=5) == model.generate(CHAT[0], max_new_tokens=5)[0]
    session.cancel()  # nothing is running: nothing happens
    assert session.generate(CHAT[1], max_new_tokens=5) == model.generate(CHAT[1], max_new_tokens=5)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_that_is_being_read_is_left(tmp_path: Path, engine: str) -> None:
    """What another thread wants at the same time is not disturbed."""
    config = replace(SHAPE, max_position_embeddings=4096)
    model = opened(tmp_path, engine, config)
    session, other = model.session(), model.session()
    prompt = [1, *np.random.default_rng(0).integers(259, 300, 4000).tolist()]
    expected = [new.token for new in model.generate_tokens([prompt[:300]], SAMPLED, 40)]
    ended: list[str | None] = []
    others: list[list[int | None]] = []
    reading = threading.Thread(
        target=lambda: ended.extend(new.finish for new in session.generate_tokens(prompt, max_new_tokens=5))
    )
    writing = threading.Thread(
        target=lambda: others.append([new.token for new in other.generate_tokens(prompt[:300], SAMPLED, 40)])
    )
    reading.start()
    writing.start()
    while session.usage is None or session.usage.fed == 0:
        time.sleep(0.001)
    session.cancel()
    reading.join()
    writing.join()
    assert ended == ["cancelled"]
    assert others == [expected]
    assert 0 < len(session.tokens) < 4000
    again = [new.token for new in session.generate_tokens(prompt[:300], SAMPLED, 40)]
    assert again == expected


# Where the context ends


def test_what_cannot_fit_is_refused_before_anything_is_computed(model: RuntimeModel) -> None:
    counting, engine = counted(model)
    tokens = len(model.tokenizer.encode(CHAT[0]))
    room = SHAPE.max_position_embeddings - tokens
    for generate in (counting.session().generate, counting.generate):
        with pytest.raises(ValueError) as error:
            generate(CHAT[0], max_new_tokens=room + 1)
        assert str(error.value) == (
            f"generate: prompt 0 has {tokens} tokens, and {room + 1} new ones do not fit the model's context of "
            f"96; ask for at most {room}, or choose context stop or slide"
        )
        with pytest.raises(ValueError, match="context is 96; shorten it to at most 95"):
            generate("x" * 200, max_new_tokens=1)
        with pytest.raises(ValueError, match="context = 'slide' has no end of its own; say max_new_tokens"):
            generate(CHAT[0], decoding=Decoding(context="slide"))
    assert engine.fed == 0
    (whole,) = counting.generate(CHAT[0], Sampling(temperature=1.5, seed=1), room)
    assert (whole.finish, len(whole.tokens)) == ("length", room)
    stopped = counting.session().generate(
        CHAT[0], Sampling(temperature=1.5, seed=1), room + 50, decoding=Decoding(context="stop")
    )
    assert stopped == whole._replace(finish="context")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="context = 'roll' is not known; choose error, stop or slide"):
        Decoding(context="roll")  # type: ignore[arg-type]
    for number in (-1, 65, 2.5):
        with pytest.raises(ValueError, match=rf"prompt_lookup = {number} must be a whole number, 0 … 64"):
            Decoding(prompt_lookup=number)  # type: ignore[arg-type]


def sliding(model: RuntimeModel, prompt: list[int], count: int) -> Iterator[int]:
    """By the definition: the first token and the latest part, fed anew to an empty cache for every token."""
    context, sequence = SHAPE.max_position_embeddings, list(prompt)
    dropped = 0
    for _ in range(count):
        while len(sequence) - dropped > context:
            dropped += context // 2
        seen = np.array(sequence[:1] + sequence[1 + dropped :])
        states = model.engine.forward(seen, model.engine.new_cache())
        sequence.append(int(model.engine.logits(states[-1:])[0, : model.tokenizer.vocab_size].argmax()))
        yield sequence[-1]


@pytest.mark.parametrize("length", [5, 95, 96, 97, 143, 150, 300])
def test_sliding_is_the_latest_part_read_anew(model: RuntimeModel, length: int) -> None:
    prompt = [1, *np.random.default_rng(length).integers(259, 300, length - 1).tolist()]
    decoding = Decoding(context="slide")
    expected = list(sliding(model, prompt, 120))
    without_eos = expected[: expected.index(2) + 1] if 2 in expected else expected
    counting, engine = counted(model)
    taken = [new.token for new in counting.generate_tokens([prompt], max_new_tokens=120, decoding=decoding)]
    assert taken == without_eos
    assert engine.fed < 2 * (len(prompt) + 120) + 96  # half a context anew for every half of one
    session = counting.session()
    assert [new.token for new in session.generate_tokens(prompt, None, 120, decoding=decoding)] == without_eos


def test_a_slid_session_goes_on_with_what_it_holds(model: RuntimeModel) -> None:
    """A text longer than the context grows: until the next slide only what is new is computed."""
    session, decoding = model.session(), Decoding(context="slide")
    prompt = [1, *np.random.default_rng(3).integers(259, 300, 149).tolist()]
    answer = [new.token for new in session.generate_tokens(prompt, SAMPLED, 10, decoding=decoding)]
    longer = prompt + [token for token in answer if token is not None] + [300, 301, 302]
    taken = [new.token for new in session.generate_tokens(longer, SAMPLED, 10, decoding=decoding)]
    assert taken == [new.token for new in model.generate_tokens([longer], SAMPLED, 10, decoding=decoding)]
    assert session.usage is not None
    assert session.usage.fed <= 4 + len(taken) - 1
