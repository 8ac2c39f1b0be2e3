"""The learning rate over a run, at the corners by hand and everywhere by its shape."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.train.schedule import learning_rate_factor
from mobilellm.train.settings import ScheduleSettings


def cosine(step: int, steps: int, warmup: int, final_fraction: float) -> float:
    return factor("cosine", step, steps, warmup, final_fraction)


def factor(
    name: str, step: int, steps: int, warmup: int, final_fraction: float, decay_fraction: float = 0.2
) -> float:
    settings = ScheduleSettings(
        name=name, warmup_steps=warmup, final_fraction=final_fraction, decay_fraction=decay_fraction
    )
    return learning_rate_factor(step, steps, settings)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # the first step already learns
        (1, 0.5),
        (3, 1.0),  # the end of the warm-up
        (4, 1.0),  # the beginning of the cosine
        (9, 0.55),  # half way down, in the middle of steps 4 to 14
        (14, 0.1),  # the last step is at the floor
        (15, 0.1),
        (1000, 0.1),  # and what comes after it too
    ],
)
def test_by_hand(step: int, expected: float) -> None:
    assert cosine(step, steps=15, warmup=4, final_fraction=0.1) == pytest.approx(expected, abs=1e-12)


def test_quarter_points() -> None:
    root = math.sqrt(0.5)
    values = [cosine(step, steps=9, warmup=0, final_fraction=0.0) for step in (0, 2, 4, 6, 8)]
    assert values == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (1, 0, [1.0]),
        (2, 0, [1.0, 0.1]),
        (1, 1, [1.0]),
        (2, 1, [1.0, 1.0]),  # one step after the warm-up is peak and end
        (3, 1, [1.0, 1.0, 0.1]),
        (3, 3, [1 / 3, 2 / 3, 1.0]),
        (3, 6, [1 / 6, 2 / 6, 3 / 6]),  # a run that ends within its warm-up
    ],
)
def test_short_runs(steps: int, warmup: int, expected: list[float]) -> None:
    assert [cosine(step, steps, warmup, 0.1) for step in range(steps)] == pytest.approx(expected)


def test_the_papers() -> None:
    """480,000 steps, 1,000 of warm-up, to a tenth."""
    assert cosine(0, 480_000, 1000, 0.1) == pytest.approx(1e-3)
    assert cosine(999, 480_000, 1000, 0.1) == 1.0
    assert cosine(479_999, 480_000, 1000, 0.1) == pytest.approx(0.1)
    middle = (1000 + 479_999) / 2
    assert cosine(int(middle), 480_000, 1000, 0.1) == pytest.approx(0.55, abs=1e-5)


def test_no_decay() -> None:
    assert {cosine(step, 20, 5, 1.0) for step in range(5, 20)} == {1.0}


@given(st.integers(1, 300), st.integers(0, 100), st.floats(0, 1))
def test_up_then_down(steps: int, warmup: int, final_fraction: float) -> None:
    values = [cosine(step, steps, warmup, final_fraction) for step in range(steps)]
    assert all(0 <= value <= 1 for value in values)
    up, down = values[:warmup], values[warmup:]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    if len(down) > 1:
        assert (down[0], down[-1]) == (pytest.approx(1), pytest.approx(final_fraction))


# The others


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]),  # six equal steps down
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1]),  # a third of nine steps is three
    ],
)
def test_the_others_by_hand(name: str, values: list[float]) -> None:
    rates = [factor(name, step, 9, 2, 0.1, decay_fraction=1 / 3) for step in range(9)]
    assert rates == pytest.approx(values, abs=1e-12)
    assert factor(name, 100, 9, 2, 0.1, decay_fraction=1 / 3) == pytest.approx(0.1)


def test_wsd_of_a_long_run() -> None:
    """MiniCPM's: a tenth of the run to decay."""
    rates = [factor("wsd", step, 10_000, 100, 0.0, 0.1) for step in range(10_000)]
    assert rates[99:9000] == [1.0] * 8901
    assert 0.99 < rates[9001] < 1
    assert rates[9499] == pytest.approx(0.5)
    assert rates[9999] == 0.0


shape = given(st.integers(1, 300), st.integers(0, 100), st.floats(0, 1), st.floats(0, 1, exclude_min=True))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@shape
def test_all_warm_up_alike_and_end_at_the_floor(
    name: str, steps: int, warmup: int, final_fraction: float, decay_fraction: float
) -> None:
    rates = [factor(name, step, steps, warmup, final_fraction, decay_fraction) for step in range(steps)]
    assert rates[:warmup] == [(step + 1) / warmup for step in range(min(warmup, steps))]
    down = rates[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(down))
    if len(down) > 1:
        assert (down[0], down[-1]) == (pytest.approx(1), pytest.approx(final_fraction))


@shape
def test_linear_is_a_line(steps: int, warmup: int, final_fraction: float, decay_fraction: float) -> None:
    down = [factor("linear", step, steps, warmup, final_fraction) for step in range(warmup, steps)]
    falls = [a - b for a, b in itertools.pairwise(down)]
    assert falls == pytest.approx([(1 - final_fraction) / len(falls)] * len(falls)) if falls else True


@shape
def test_wsd_stays_then_falls_in_a_line(
    steps: int, warmup: int, final_fraction: float, decay_fraction: float
) -> None:
    rates = [
        factor("wsd", step, steps, warmup, final_fraction, decay_fraction) for step in range(warmup, steps)
    ]
    if len(rates) < 2:
        return
    decay = min(max(1, round(decay_fraction * steps)), len(rates) - 1)
    stay = len(rates) - decay
    assert rates[:stay] == [1.0] * stay
    falls = [a - b for a, b in zip(rates[stay - 1 :], rates[stay:], strict=False)]
    assert falls == pytest.approx([(1 - final_fraction) / decay] * decay)
