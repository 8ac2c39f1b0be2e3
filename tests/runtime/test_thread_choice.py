"""Which number of threads is chosen, from times that are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.runtime.cores import Cores
from mobilellm.runtime.thread_choice import (
    MARGIN,
    MOST_THREADS,
    ThreadChoice,
    ThreadChoices,
    counts_up_to,
    fewest_of_the_best,
)

A_WHILE = 400
"""Passes that are enough for the first looking around, wherever it goes."""


def choice_of(first: int, most: int) -> ThreadChoice:
    return ThreadChoice(sorted({first, *counts_up_to(most)}), first)


def passes(choice: ThreadChoice, seconds: Callable[[int, int], float], count: int) -> list[int]:
    """The numbers of threads of so many passes, which take seconds(threads, number of the pass)."""
    taken = []
    for number in range(count):
        taken.append(choice.threads)
        choice.took(seconds(choice.threads, number))
    return taken


def settled(first: int, most: int, seconds: Callable[[int, int], float]) -> int:
    taken = passes(choice_of(first, most), seconds, A_WHILE)
    assert len(set(taken[-100:])) == 1
    return taken[-1]


def bound_by_memory(enough: int, meeting: float = 0.0) -> Callable[[int, int], float]:
    """A pass that threads speed up until memory is used up, and slow down by meeting."""
    return lambda threads, _: 1 / min(threads, enough) + meeting * threads


def test_numbers_worth_a_try() -> None:
    assert [counts_up_to(most) for most in (1, 2, 3, 5, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 8],
    ]  # fmt: skip
    assert counts_up_to(300) == counts_up_to(MOST_THREADS)
    assert counts_up_to(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]


def test_fewest_within_the_margin() -> None:
    assert fewest_of_the_best({1: 2.0, 2: 1.04, 3: 1.0, 4: 0.999}) == 2
    assert fewest_of_the_best({1: 2.0, 2: 1.06, 3: 1.0, 4: 0.999}) == 3


@pytest.mark.parametrize(
    ("first", "most", "seconds", "best"),
    [
        (2, 2, bound_by_memory(2), 2),
        (2, 2, lambda threads, _: float(threads), 1),  # one core is not ours, whatever the system says
        (4, 4, bound_by_memory(3), 3),
        (4, 16, bound_by_memory(12), 12),
        (4, 16, bound_by_memory(16, 0.01), 8),  # 12 would be 2 % faster
        (4, 64, bound_by_memory(2, 0.02), 2),
        (4, 12, lambda threads, _: 1 / min(threads, 4) + (threads > 4) * 0.5, 4),  # small cores
        (1, 1, bound_by_memory(8), 1),
    ],
)
def test_it_settles_on_the_best(
    first: int, most: int, seconds: Callable[[int, int], float], best: int
) -> None:
    assert settled(first, most, seconds) == best


@given(most=st.integers(1, 80), first=st.integers(1, 80), seed=st.integers(0))
def test_never_more_than_there_are_whatever_passes_take(most: int, first: int, seed: int) -> None:
    first, chance = min(first, most), random.Random(seed)
    taken = passes(choice_of(first, most), lambda *_: chance.lognormvariate(0, 2), A_WHILE)
    assert all(1 <= threads <= most for threads in taken)
    assert set(taken[:32]) == {first}


@given(
    most=st.integers(1, 64),
    enough=st.integers(1, 64),
    meeting=st.sampled_from([0, 0.001, 0.01, 0.05, 0.3]),
    data=st.data(),
)
def test_within_the_margin_of_its_neighbours(
    most: int, enough: int, meeting: float, data: st.DataObject
) -> None:
    seconds, counts = bound_by_memory(enough, meeting), counts_up_to(most)
    first = data.draw(st.sampled_from(counts))
    best = settled(first, most, seconds)
    place = counts.index(best)
    near = counts[max(0, place - 1) : place + 2]
    fastest = min(seconds(count, 0) for count in near)
    assert seconds(best, 0) <= fastest * (1 + MARGIN) * (1 + 1e-9)


@given(
    enough=st.sampled_from([1, 2, 3, 4, 8]),
    strange=st.integers(0, A_WHILE - 1),
    times=st.sampled_from([0.01, 0.3, 3, 50]),
)
def test_one_strange_pass_changes_nothing(enough: int, strange: int, times: float) -> None:
    clean = bound_by_memory(enough, 0.02)

    def disturbed(threads: int, number: int) -> float:
        return clean(threads, number) * (times if number == strange else 1)

    assert settled(4, 8, disturbed) == settled(4, 8, clean)


def test_a_ctrl_c_while_it_thinks_does_not_end_it() -> None:
    class Interrupted(float):
        def __rmul__(self, other: float) -> float:
            raise KeyboardInterrupt

    choice, interrupted = choice_of(2, 4), False
    for _ in range(2 * A_WHILE):
        seconds = 1 / choice.threads
        try:
            choice.took(seconds if interrupted else Interrupted(seconds))
        except KeyboardInterrupt:
            interrupted = True
    assert interrupted
    assert choice.threads == 4


def test_it_follows_what_runs_beside_it() -> None:
    choice = choice_of(2, 2)
    alone, beside = bound_by_memory(2), lambda threads, _: 1.0 + 0.2 * (threads > 1)
    assert set(passes(choice, alone, 1500)[-100:]) == {2}
    assert set(passes(choice, beside, 1500)[-100:]) == {1}
    assert set(passes(choice, alone, 1500)[-100:]) == {2}


def test_trying_costs_little() -> None:
    """Of a processor of two cores, where one thread takes 1.8 times as long; and of sixteen."""
    for first, most, seconds in (
        (2, 2, lambda threads, _: 1.8 if threads == 1 else 1.0),
        (4, 16, bound_by_memory(4)),
    ):
        choice = choice_of(first, most)
        for count, bar in ((32, 1), (132, 1.05), (10_000, 1.006)):
            taken = passes(choice_of(first, most), seconds, count)
            assert sum(seconds(threads, 0) for threads in taken) <= bar * count * seconds(first, 0)
        assert choice.threads == first


def test_each_number_of_tokens_is_measured_by_itself() -> None:
    choices = ThreadChoices.measured(Cores(fast=8, usable=12))
    best = {1: bound_by_memory(2), 4: bound_by_memory(12)}
    for number in range(A_WHILE):
        for tokens in (1, 20, 4):
            threads = choices.begin(tokens)
            if tokens == 20:
                assert threads == 8
            else:
                choices.spend(best[tokens](threads, number))
    assert (choices.threads(1), choices.threads(4), choices.threads(2)) == (2, 12, 4)
    assert ThreadChoices.measured(Cores(40, 64)).begin(256) == 16


def test_a_pass_and_the_logits_after_it_are_one() -> None:
    """The states take longer on more threads, the logits, of which there are more, less."""
    choices = ThreadChoices.measured(Cores(4, 4))
    for _ in range(A_WHILE):
        threads = choices.begin(1)
        choices.spend(1 + 0.1 * threads)
        choices.spend(8 / threads)
    assert choices.threads(1) == 4


def test_a_pass_that_was_cancelled_does_not_count() -> None:
    choices = ThreadChoices.measured(Cores(2, 2))
    for _ in range(A_WHILE):
        choices.spend(float(choices.begin(1) > 1))
        choices.drop()
    assert choices.threads(1) == 2


def test_a_number_that_was_named_stays() -> None:
    choices = ThreadChoices.fixed(3)
    for _ in range(A_WHILE):
        for tokens in (1, 256):
            assert choices.begin(tokens) == choices.threads(tokens) == 3
            choices.spend(1.0)
