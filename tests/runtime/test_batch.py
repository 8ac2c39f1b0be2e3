"""A continuous batch: whoever else runs, each text is the one it would be alone."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE
from running import ENGINES, counted, opened

from mobilellm.completion import Completion, Piece
from mobilellm.runtime import ContinuousBatch, Decoding
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Draw, Floats, Sampling

ASKED = [  # prompt, sampling, new tokens, stop strings, decoding
    ("some words", Sampling(), 20, (), None),
    ("", Sampling(temperature=1.0, seed=1), 30, (), None),
    ("and some more words of all kinds to read", Sampling(temperature=0.7, top_k=20, seed=2), 15, (), None),
    ("some words to", Sampling(temperature=1.3, repetition_penalty=1.2, seed=3), 25, ("e", "word"), None),
    ("words " * 10, Sampling(temperature=1.0, seed=4), 90, (), Decoding(context="slide")),
    ("some words some words some words", Sampling(), 40, (), Decoding(prompt_lookup=4)),
    ("kinds", Sampling(temperature=2.0, seed=6), None, (), None),
]


@pytest.fixture(scope="module", params=ENGINES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RuntimeModel:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def alone(model: RuntimeModel) -> list[Completion]:
    return [
        model.generate(prompt, sampling, most, stop, decoding)[0]
        for prompt, sampling, most, stop, decoding in ASKED
    ]


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_each_text_is_the_one_it_would_be_alone(
    model: RuntimeModel, alone: list[Completion], slots: int
) -> None:
    counting, engine = counted(model)
    with ContinuousBatch(counting, slots) as batch:
        requests = [batch.add(*asked) for asked in ASKED]
        assert [request.result() for request in requests] == alone
    assert max(map(len, engine.batches)) == slots  # so many at once, and no more
    assert {completion.finish for completion in alone} >= {"length", "stop"}


def test_requests_from_many_threads_at_any_time(model: RuntimeModel, alone: list[Completion]) -> None:
    """Some are cancelled: what they got by then is the beginning of what they would have got."""
    random_numbers = random.Random(0)
    found: list[tuple[int, Completion]] = []

    def ask(batch: ContinuousBatch, seed: int) -> None:
        own = random.Random(seed)
        for _ in range(3):
            number = own.randrange(len(ASKED))
            request = batch.add(*ASKED[number])
            if own.random() < 0.4:
                for _, _ in zip(range(own.randrange(1, 6)), request, strict=False):
                    pass
                request.cancel()
            found.append((number, request.result()))
            time.sleep(own.random() * 0.005)

    with ContinuousBatch(model, 3) as batch:
        threads = [threading.Thread(target=ask, args=(batch, random_numbers.random())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 18
    for number, completion in found:
        if completion.finish == "cancelled":
            count = len(completion.tokens)
            assert completion.tokens == alone[number].tokens[:count]
        else:
            assert completion == alone[number]
    assert {completion.finish == "cancelled" for _, completion in found} == {True, False}


def test_pieces_come_as_they_are_made_and_to_a_function_too(model: RuntimeModel) -> None:
    shown: list[Piece] = []
    with ContinuousBatch(model) as batch:
        request = batch.add(*ASKED[2][:3], show=shown.append)
        pieces = list(request)
        assert list(request) == pieces  # and again
    assert shown == pieces == list(model.stream(*ASKED[2][:3]))


def test_a_prompt_beside_others_does_not_hold_them_up(tmp_path: Path) -> None:
    """A newcomer's prompt is read in small pieces, and those who write get a token with each."""
    model, engine = counted(opened(tmp_path, "native", replace(SHAPE, max_position_embeddings=2048)))
    with ContinuousBatch(model, 2) as batch:
        first = batch.add("some", Sampling(temperature=2.0, seed=0), max_new_tokens=1500)
        next(iter(first))
        prompt = [1, *np.random.default_rng(0).integers(259, 300, 640).tolist()]
        second = batch.add(prompt, max_new_tokens=1)
        second.result()
        first.cancel()
    mixed = [counts for counts in engine.batches if len(counts) == 2]
    assert [sorted(counts) for counts in mixed] == [[1, 63]] * 10 + [[1, 11]]


def test_a_slot_is_free_at_once_and_knows_what_it_read(model: RuntimeModel) -> None:
    counting, engine = counted(model)
    long, other = "some words to learn pieces from, and more", "to begin anew"
    with ContinuousBatch(counting, 2) as batch:
        batch.add(long, max_new_tokens=3).result()
        batch.add(other, max_new_tokens=3).result()
        engine.batches.clear()
        again = batch.add(long + " words", max_new_tokens=2)
        again.result()
        count = len(model.tokenizer.encode(long + " words"))
        assert again.usage.prompt == count
        assert again.usage.reused >= len(model.tokenizer.encode(long)) - 3
        assert sum(map(sum, engine.batches)) == again.usage.fed == count - again.usage.reused + 1


def test_who_waits_can_leave(model: RuntimeModel) -> None:
    with ContinuousBatch(model, 1) as batch:
        running = batch.add("some", Sampling(temperature=1.0, seed=0), 50)
        next(iter(running))
        waiting = batch.add("words", max_new_tokens=5)
        last = batch.add("kinds", max_new_tokens=5)
        waiting.cancel()
        assert waiting.result() == Completion("", [], "cancelled")
        running.cancel()
        assert last.result() == model.generate("kinds", max_new_tokens=5)[0]
        assert waiting.usage.fed == 0
        running.cancel()  # long over: nothing happens


def test_a_long_prompt_is_left_and_the_others_go_on(tmp_path: Path) -> None:
    model = opened(tmp_path, "native", replace(SHAPE, max_position_embeddings=8192))
    expected = model.generate(*ASKED[1][:3])[0]
    with ContinuousBatch(model, 2) as batch:
        reading = batch.add([1, *[300] * 8000], max_new_tokens=5)
        writing = batch.add(*ASKED[1][:3])
        next(iter(writing))
        reading.cancel()
        assert reading.result().finish == "cancelled"
        assert writing.result() == expected
        assert 0 < reading.usage.fed < 8000


def test_closing_ends_all(model: RuntimeModel) -> None:
    batch = ContinuousBatch(model, 1)
    requests = [batch.add("some", Sampling(temperature=2.0, seed=seed)) for seed in range(3)]
    batch.close()
    batch.close()
    assert [request.result().finish for request in requests] == ["cancelled"] * 3
    with pytest.raises(ValueError, match="this batch was closed"):
        batch.add("some")


# Mistakes and faults


def test_what_cannot_be_is_refused_at_once(model: RuntimeModel) -> None:
    with pytest.raises(ValueError, match="slots = 0 must be at least 1"):
        ContinuousBatch(model, 0)
    with ContinuousBatch(model) as batch:
        with pytest.raises(ValueError, match="context is 96; shorten it to at most 95"):
            batch.add("x" * 200)
        with pytest.raises(ValueError, match="ask for at most"):
            batch.add("x", max_new_tokens=500)
        with pytest.raises(ValueError, match="a stop string is empty"):
            batch.add("x", stop=[""])
        with pytest.raises(ValueError, match="has no tokens"):
            batch.add([])


def test_what_goes_wrong_is_told_to_those_it_concerns(model: RuntimeModel) -> None:
    def fails(piece: Piece) -> None:
        raise KeyError("shown")

    with ContinuousBatch(model, 2) as batch:
        other = batch.add(*ASKED[0])
        request = batch.add("some", max_new_tokens=5, show=fails)
        with pytest.raises(KeyError, match="shown"):
            request.result()
        assert other.result() == model.generate(*ASKED[0])[0]


def test_a_fault_of_the_engine_is_told_and_does_not_last(
    model: RuntimeModel, alone: list[Completion]
) -> None:
    counting, engine = counted(model)
    with ContinuousBatch(counting, 2) as batch:
        batch.add(*ASKED[0]).result()
        engine.fault = MemoryError("no memory for this batch")
        request = batch.add(*ASKED[1])
        with pytest.raises(MemoryError, match="no memory for this batch"):
            request.result()
        engine.fault = None
        assert batch.add(*ASKED[1]).result() == alone[1]
        assert batch.add(*ASKED[0]).result() == alone[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_batch_of_another_process_is_refused(model: RuntimeModel) -> None:
    with ContinuousBatch(model) as batch:
        child = os.fork()
        if child == 0:
            try:
                batch.add("some")
            except ValueError as error:
                os._exit(7 if "made by another process" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_one_that_cannot_draw_fails_alone(model: RuntimeModel) -> None:
    def never(draw: Draw) -> Draw:
        def drawn(logits: Floats) -> int:
            raise ValueError("no token will do")

        return drawn

    told: list[Exception] = []
    with ContinuousBatch(model, slots=2) as batch:
        good = batch.add("some words", max_new_tokens=20)
        bad = batch.add("some words", max_new_tokens=20, failed=told.append, around=never)
        with pytest.raises(ValueError, match="no token will do"):
            bad.result()
        assert [str(error) for error in told] == ["no token will do"]
        assert good.result() == model.generate("some words", max_new_tokens=20)[0]
        assert batch.add("x", max_new_tokens=2).result() == model.generate("x", max_new_tokens=2)[0]


def test_what_draws_may_be_wrapped(model: RuntimeModel) -> None:
    def only_290(draw: Draw) -> Draw:
        def drawn(logits: Floats) -> int:
            masked = np.full_like(logits, -np.inf)
            masked[290] = 0
            return draw(masked)

        return drawn

    with ContinuousBatch(model, slots=1) as batch:
        for temperature in (0.0, 1.0):
            text = batch.add(
                "x", Sampling(temperature=temperature), max_new_tokens=3, around=only_290
            ).result()
            assert text.tokens == [290] * 3
