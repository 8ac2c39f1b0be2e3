"""Sampling: the filters are those of transformers, draws follow the distribution, seeds reproduce."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mobilellm.sampling import Sampler, Sampling, distribution

Floats = NDArray[np.float32]


def random_logits(size: int, seed: int, spread: float = 3.0) -> Floats:
    return np.random.default_rng(seed).normal(0.0, spread, size).astype(np.float32)


def by_transformers(logits: Floats, sampling: Sampling, history: list[int]) -> NDArray[np.float64]:
    """Probabilities (V,) after the processors of transformers, in the order its `generate` puts them."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores = torch.from_numpy(logits).double()[None]
    probabilities = processors(torch.tensor([history], dtype=torch.long), scores).softmax(-1)[0]
    return np.asarray(probabilities.numpy(), dtype=np.float64)


def by_us(logits: Floats, sampling: Sampling) -> NDArray[np.float64]:
    ids, probabilities = distribution(logits, sampling)
    assert len(set(ids.tolist())) == len(ids)
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    return dense


settings_of_filters = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 1500),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0001, 0.9)),
)


@settings(max_examples=300, deadline=None)
@given(settings_of_filters, st.sampled_from([1, 2, 17, 256, 257, 1000, 5000]), st.integers(0, 10**6))
def test_filters_equal_those_of_transformers(sampling: Sampling, size: int, seed: int) -> None:
    logits = random_logits(size, seed)
    wanted = by_transformers(logits, sampling, [0])
    ours = by_us(logits, sampling)
    # A token whose cumulative mass is top_p to the last bit may fall on either side.
    np.testing.assert_allclose(ours, wanted, atol=1e-9, rtol=1e-6)
    assert set(np.flatnonzero(ours)) == set(np.flatnonzero(wanted))


@pytest.mark.parametrize("vocabulary", [32_000, 300])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 0.999},  # more than the first batch of the most likely
        {"min_p": 0.1},
        {"min_p": 1e-9},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"top_p": 0.5, "min_p": 0.3, "temperature": 2.0},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 0.999999},
        {"top_k": 10**9},
    ],
    ids=str,
)
def test_filters_on_a_whole_vocabulary(vocabulary: int, filters: dict[str, Any]) -> None:
    sampling = Sampling(**({"temperature": 0.8} | filters))
    logits = random_logits(vocabulary, 7)
    np.testing.assert_allclose(by_us(logits, sampling), by_transformers(logits, sampling, [0]), atol=1e-9)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
@pytest.mark.parametrize("history", [[], [3], [3, 3, 7, 0, 41]])
def test_repetition_penalty_equals_that_of_transformers(penalty: float, history: list[int]) -> None:
    """Read off which token greedy takes as all others are sunk one after another."""
    sampling = Sampling(repetition_penalty=penalty)
    logits = random_logits(42, 3)
    wanted = by_transformers(logits, Sampling(temperature=1.0, repetition_penalty=penalty), history)
    before = logits.copy()
    assert Sampler(sampling, history)(logits) == wanted.argmax()
    assert (logits == before).all()  # the caller's array is the caller's
    order = np.argsort(-wanted, kind="stable")
    for rank in range(1, 42):
        sunk = logits.copy()
        sunk[order[:rank]] = -np.inf
        assert Sampler(sampling, history)(sunk) == order[rank]


def test_drawn_tokens_are_penalised_too() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    logits = np.array([1.0, 0.9, -1.0, 0.6], dtype=np.float32)
    assert [sampler(logits) for _ in range(5)] == [0, 1, 3, 0, 0]
    plain = Sampler(Sampling())
    assert [plain(logits) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, top_k=6, seed=5),
        Sampling(temperature=1.5, top_p=0.8, seed=5),
        Sampling(temperature=1.0, min_p=0.05, seed=5),
    ],
    ids=str,
)
def test_frequencies_fit_the_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square over 20,000 draws, refused beyond five standard deviations (seed fixed)."""
    logits, draws = random_logits(40, 11, spread=1.0), 20_000
    sampler = Sampler(sampling)
    counted = Counter(sampler(logits) for _ in range(draws))
    ids, probabilities = distribution(logits, sampling)
    expected = dict(zip(ids.tolist(), probabilities * draws, strict=True))
    assert counted.keys() <= expected.keys()
    assert min(expected.values()) > 5
    statistic = sum((counted[token] - wanted) ** 2 / wanted for token, wanted in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert statistic > freedom - 5 * math.sqrt(2 * freedom)  # too even would be wrong as well


def test_seeds_reproduce_and_rows_and_seeds_differ() -> None:
    logits = random_logits(1000, 1)

    def draw(seed: int | None, row: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), row=row)
        return [sampler(logits) for _ in range(30)]

    assert draw(1, 0) == draw(1, 0)
    different = [draw(1, 0), draw(1, 1), draw(2, 0), draw(0, 0), draw(0, 1), draw(None, 0), draw(None, 0)]
    assert len({tuple(drawn) for drawn in different}) == len(different)


def test_the_draws_of_a_seed_are_these() -> None:
    """A seed means the same in every version: these were drawn once and written down."""
    sampler = Sampler(Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=1234))
    logits = np.sin(3.0 * np.arange(50)).astype(np.float32)
    assert [sampler(logits) for _ in range(12)] == [47, 36, 19, 13, 9, 34, 13, 9, 3, 13, 30, 38]


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling())(np.array([0.0, 2.0, 2.0], dtype=np.float32)) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310, 5e-324])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    logits = random_logits(100, 4)
    sampler = Sampler(Sampling(temperature=temperature, seed=0))
    assert {sampler(logits) for _ in range(20)} == {int(logits.argmax())}


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[7, 30]] = 0.0
    for filters in ({}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 0.1}):
        sampler = Sampler(Sampling(temperature=1.0, seed=0, **filters))
        assert {sampler(logits) for _ in range(50)} == {7, 30}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_broken_logits_are_refused(temperature: float, bad: float, all_of_them: bool) -> None:
    logits = random_logits(10, 0)
    logits[slice(None) if all_of_them else 3] = bad
    with pytest.raises(ValueError, match=r"the logits hold (nan|inf)"):
        Sampler(Sampling(temperature=temperature))(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^sampling: {field} = {value} must be ") as caught:
        Sampling(**{field: value})
    assert "\n" not in str(caught.value)


def test_no_torch_is_needed() -> None:
    import subprocess
    import sys

    script = "import sys, mobilellm.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_history_of_ids_beyond_the_logits_changes_nothing() -> None:
    """An embedding may have more rows than a tokenizer has pieces, and a prompt may use them."""
    logits = np.array([1, 3, 2.5], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), history=[1, 3, 7])(logits) == 2
