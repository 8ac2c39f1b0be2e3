"""Guesses from the prompt: they save passes and never change a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ENGINES, counted, opened

from mobilellm.runtime import Decoding
from mobilellm.runtime.generation import Usage
from mobilellm.runtime.kv_cache import Room
from mobilellm.runtime.prompt_lookup import PromptLookup
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.05, seed=2)
REPETITIVE = "some words to learn " * 6


@pytest.fixture(scope="module", params=ENGINES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RuntimeModel:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


def by_search(tokens: list[int], most: int) -> list[int]:
    """What followed the last three tokens, or the last two, where they stood last."""
    for length in (3, 2):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[len(tokens) - length :]:
                return tokens[start + length :][:most]
    return []


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), most=st.integers(1, 6))
@settings(max_examples=300)
def test_a_guess_is_what_followed_the_same_tokens_last(tokens: list[int], most: int) -> None:
    lookup = PromptLookup()
    for count in range(1, len(tokens) + 1):
        assert lookup.guess(tokens[:count], most) == by_search(tokens[:count], most)
    assert PromptLookup().guess(tokens, most) == by_search(tokens, most)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("guesses", [1, 3, 10])
def test_guesses_change_no_token_and_save_passes(
    model: RuntimeModel, sampling: Sampling, guesses: int
) -> None:
    for prompt in (REPETITIVE, "kinds", ""):
        counting, engine = counted(model)
        session = counting.session()
        decoding = Decoding(prompt_lookup=guesses)
        completion = session.generate(prompt, sampling, 40, decoding=decoding)
        assert completion == model.generate(prompt, sampling, 40)[0]
        usage = session.usage
        assert usage is not None
        assert len(engine.batches) == len(completion.tokens) - usage.accepted
        assert (
            engine.fed
            == usage.fed
            == usage.prompt + len(completion.tokens) - 1 + usage.guessed - usage.accepted
        )
        assert 0 <= usage.accepted <= usage.guessed
        assert session.tokens == model.tokenizer.encode(prompt) + completion.tokens[:-1]


class ScriptedEngine:
    """An engine whose model says the same text whatever it reads: the token after each position."""

    config = SHAPE

    def __init__(self, script: list[int]) -> None:
        self.script, self.passes = script, 0

    def new_cache(self, capacity: int | None = None) -> Room:
        return Room(SHAPE, capacity or SHAPE.max_position_embeddings)

    def forward_batch(self, feeds: Sequence[tuple[np.ndarray, Room]]) -> np.ndarray:
        self.passes += 1
        positions = []
        for tokens, cache in feeds:
            cache.reserve(tokens, SHAPE.vocab_size)
            positions += range(cache.length, cache.length + len(tokens))
            cache.length += len(tokens)
        return np.array(positions, np.float32)[:, None]

    def logits(self, states: np.ndarray) -> np.ndarray:
        following = [self.script[int(position) + 1] for position in states[:, 0]]
        return np.eye(SHAPE.vocab_size, dtype=np.float32)[following]


def test_a_text_that_repeats_itself_takes_few_passes(model: RuntimeModel) -> None:
    script = [1, *range(260, 270)] + [*range(270, 280)] * 8
    scripted = replace(model, engine=ScriptedEngine(script))  # type: ignore[arg-type]
    session, prompt = scripted.session(), script[:23]
    new = session.generate_tokens(prompt, max_new_tokens=61, decoding=Decoding(prompt_lookup=9))
    assert [each.token for each in new] == script[23:84]
    assert session.usage == Usage(23, 0, 23 + 60, 54, 54)
    assert scripted.engine.passes == 1 + 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [["e"], ["so", "ds"], ["w", "z", "k"]])
def test_a_stop_string_ends_among_guesses(model: RuntimeModel, stop: list[str]) -> None:
    for sampling in (GREEDY, SAMPLED):
        expected = model.generate(REPETITIVE, sampling, 40, stop)
        assert model.generate(REPETITIVE, sampling, 40, stop, Decoding(prompt_lookup=6)) == expected
        session = model.session()
        assert [session.generate(REPETITIVE, sampling, 40, stop, Decoding(prompt_lookup=6))] == expected
        # and goes on from there
        assert session.generate(REPETITIVE, sampling, 9) == model.generate(REPETITIVE, sampling, 9)[0]


def test_guesses_end_with_the_context_and_slide_with_it(model: RuntimeModel) -> None:
    sampling = Sampling(temperature=0.3, seed=1)
    for context, most in (("stop", 200), ("slide", 200), ("error", None)):
        expected = model.generate(REPETITIVE, sampling, most, decoding=Decoding(context=context))  # type: ignore[arg-type]
        taken = model.generate(
            REPETITIVE,
            sampling,
            most,
            decoding=Decoding(context=context, prompt_lookup=5),  # type: ignore[arg-type]
        )
        assert taken == expected


def test_what_was_guessed_wrong_leaves_nothing_behind(tmp_path: Path) -> None:
    """The cache after guesses holds bit for bit what it holds without."""
    model = opened(tmp_path, "native")
    sessions = [model.session(), model.session()]
    for session, guesses in zip(sessions, (0, 7), strict=True):
        session.generate(REPETITIVE, SAMPLED, 40, decoding=Decoding(prompt_lookup=guesses))
    usage = sessions[1].usage
    assert usage is not None
    assert usage.accepted < usage.guessed
    plain, guessed = (session._held.cache.state() for session in sessions)
    for ours, theirs in zip(plain, guessed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sessions[0].tokens == sessions[1].tokens


def test_several_prompts_are_guessed_each_by_itself(model: RuntimeModel) -> None:
    prompts = [REPETITIVE, "kinds of words and kinds of words", "some"]
    decoding = Decoding(prompt_lookup=4)
    together = model.generate(prompts, SAMPLED, 30, decoding=decoding)
    assert together == model.generate(prompts, SAMPLED, 30)
