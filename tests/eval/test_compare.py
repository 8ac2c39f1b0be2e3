"""Paired comparison: the right differences, intervals that cover, and nothing compared that is not comparable."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation_records import all_eight, identity, perplexity, zero_shot
from mobilellm.eval.compare import Comparison, Difference, Ratio, compare
from mobilellm.eval.published import TASKS
from mobilellm.eval.resampling import bootstrap_p, mcnemar, resampled_sums

A, B = identity("a"), identity("b")


def only(comparison: Comparison) -> Any:
    (row,) = comparison.rows
    return row


def test_differences_of_a_task_by_hand() -> None:
    a = zero_shot({"piqa": [1, 1, 0, 0, 1, 0, 1, 1]}, A)
    b = zero_shot({"piqa": [1, 1, 1, 1, 1, 0, 0, 1]}, B)
    compared = compare(a, b)
    row = only(compared)
    assert isinstance(row, Difference)
    assert (compared.a, compared.b, compared.metric) == ("a", "b", "paper")
    assert (row.name, row.documents, row.won, row.lost) == ("piqa", 8, 2, 1)
    assert (row.a, row.b, row.difference) == (5 / 8, 6 / 8, 1 / 8)
    assert row.low < 0 < row.difference < row.high
    assert row.p == 1.0  # 2 of 3 coins or more, either way


def test_the_average_counts_every_task_the_same() -> None:
    a = zero_shot({"openbookqa": [0.0] * 10, "hellaswag": [0.0] * 90}, A)
    b = zero_shot({"openbookqa": [1.0] * 5 + [0.0] * 5, "hellaswag": [0.0] * 90}, B)
    average = compare(a, b).rows[-1]
    assert isinstance(average, Difference)
    assert average.name == "average"
    assert average.difference == pytest.approx(0.25)
    assert (average.documents, average.won, average.lost) == (100, 5, 0)


def test_rows_stand_in_the_cards_order() -> None:
    rows = compare(all_eight(0.4, model=A), all_eight(0.5, seed=1, model=B)).rows
    assert [row.name for row in rows] == [*TASKS, "average"]


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    """Drawing document by document, as one would without the multinomial counts."""
    generator = np.random.default_rng(5)
    a, b = (generator.random((2, 300)) < [[0.4], [0.5]]).astype(float)
    row = only(compare(zero_shot({"piqa": a.tolist()}, A), zero_shot({"piqa": b.tolist()}, B)))
    drawn = generator.integers(0, 300, (20_000, 300))
    low, high = np.quantile((b - a)[drawn].mean(axis=1), [0.025, 0.975])
    assert row.low == pytest.approx(low, abs=0.006)
    assert row.high == pytest.approx(high, abs=0.006)


def test_the_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(6)
    a = generator.gamma(3, 1000, 100)
    b = a * generator.normal(0.95, 0.02, 100)
    row = only(compare(perplexity(a.tolist(), A), perplexity(b.tolist(), B)))
    other = stats.bootstrap(
        (a, b), lambda x, y, axis: y.sum(axis=axis) / x.sum(axis=axis), paired=True, vectorized=True,
        method="percentile", n_resamples=10_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (row.ratio_low, row.ratio_high) == pytest.approx(tuple(other), abs=0.0004)


@pytest.mark.parametrize(
    ("right_a", "right_b", "together"), [(0.5, 0.5, 0.8), (0.3, 0.4, 0.5), (0.6, 0.55, 0.0)]
)
def test_intervals_cover_the_truth_95_times_of_100(right_a: float, right_b: float, together: float) -> None:
    """400 simulated pairs of models that share a part of what they find hard; chance alone gives 95 ± 3.3 (3 s)."""
    generator = np.random.default_rng(7)
    covered = 0
    for turn in range(400):
        one, other = generator.random((2, 400))
        other = np.where(generator.random(400) < together, one, other)
        a, b = ((x < y).astype(float).tolist() for x, y in ((one, right_a), (other, right_b)))
        row = only(compare(zero_shot({"piqa": a}, A), zero_shot({"piqa": b}, B), samples=1000, seed=turn))
        covered += row.low <= right_b - right_a <= row.high
    assert 0.917 <= covered / 400 <= 0.983, covered


def test_intervals_of_the_average_and_of_perplexity_cover() -> None:
    generator = np.random.default_rng(8)
    averages = ratios = 0
    for turn in range(200):
        sizes = {"piqa": 150, "openbookqa": 60, "boolq": 300}
        rights = {"piqa": (0.5, 0.6), "openbookqa": (0.3, 0.35), "boolq": (0.6, 0.55)}
        a, b = (
            zero_shot({task: (generator.random(n) < rights[task][i]).astype(float).tolist() for task, n in sizes.items()}, m)
            for i, m in enumerate((A, B))
        )  # fmt: skip
        row: Any = compare(a, b, samples=500, seed=turn).rows[-1]
        averages += row.low <= (0.1 + 0.05 - 0.05) / 3 <= row.high
        hard = generator.gamma(20, 100, 60)
        nats = (
            (hard + generator.normal(0, 40, 60)).tolist(),
            (0.97 * hard + generator.normal(0, 40, 60)).tolist(),
        )
        ratio: Any = only(compare(perplexity(nats[0], A), perplexity(nats[1], B), samples=500, seed=turn))
        ratios += ratio.ratio_low <= 0.97 <= ratio.ratio_high
    assert 0.9 <= averages / 200 <= 0.99, averages
    assert 0.9 <= ratios / 200 <= 0.99, ratios


answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


@given(answers, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_swapping_the_two_turns_everything_round(pairs: list[tuple[bool, bool]], seed: int) -> None:
    a, b = (zero_shot({"piqa": [float(pair[i]) for pair in pairs]}, m) for i, m in enumerate((A, B)))
    forth, back = (only(compare(*both, samples=200, seed=seed)) for both in ((a, b), (b, a)))
    assert back.difference == -forth.difference
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=1e-12)
    assert (back.won, back.lost, back.p) == (forth.lost, forth.won, forth.p)


def test_swapping_two_perplexities_inverts_the_ratios() -> None:
    generator = np.random.default_rng(9)
    a, b = (
        perplexity(generator.gamma(50, 100, 80).tolist(), A),
        perplexity(generator.gamma(52, 100, 80).tolist(), B),
    )
    forth, back = only(compare(a, b)), only(compare(b, a))
    assert back.difference == pytest.approx(-forth.difference)
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
    assert (back.ratio, back.perplexity_ratio) == pytest.approx((1 / forth.ratio, 1 / forth.perplexity_ratio))
    assert (1 / back.perplexity_low, 1 / back.perplexity_high) == pytest.approx(
        (forth.perplexity_high, forth.perplexity_low)
    )
    assert back.p == forth.p


def test_a_model_does_not_differ_from_itself() -> None:
    for record in (all_eight(0.4, model=A), perplexity([3.0, 4.0, 5.5], A)):
        for row in compare(record, record).rows:
            assert row.difference == row.low == row.high == 0
            assert (row.won, row.lost, row.p) == (0, 0, 1)


def test_perplexities_by_hand() -> None:
    a, b = perplexity([8000.0, 6000.0], A), perplexity([7000.0, 6500.0], B)
    row = only(compare(a, b))
    assert isinstance(row, Ratio)
    assert (row.name, row.protocol, row.windows, row.won, row.lost) == ("wikitext2", "reference", 2, 1, 1)
    assert row.a == pytest.approx(a.results["wikitext2"]["bits_per_byte"])
    assert row.b == pytest.approx(b.results["wikitext2"]["bits_per_byte"])
    assert row.difference == pytest.approx(row.b - row.a)
    assert row.ratio == pytest.approx(13_500 / 14_000)
    assert row.per == "token"
    token = [r.results["wikitext2"]["token_perplexity"] for r in (a, b)]
    assert row.perplexity_ratio == pytest.approx(token[1] / token[0])
    assert row.perplexity_low < row.perplexity_ratio < row.perplexity_high


def test_tokenizers_that_differ_are_compared_by_the_word() -> None:
    a = perplexity([800.0, 600.0, 700.0], A, protocol="document", tokens=200)
    b = perplexity([780.0, 620.0, 650.0], B, protocol="document", tokens=150)
    row = only(compare(a, b))
    assert row.per == "word"
    word = [r.results["wikitext2"]["word_perplexity"] for r in (a, b)]
    assert row.perplexity_ratio == pytest.approx(word[1] / word[0])


def test_the_same_seed_gives_the_same_and_tasks_do_not_disturb_each_other() -> None:
    a, b = all_eight(0.4, model=A), all_eight(0.5, seed=1, model=B)
    assert compare(a, b) == compare(a, b)
    assert compare(a, b).rows != compare(a, b, seed=1).rows
    alone = (
        {task: a.items[task]["acc"] for task in ("piqa",)},
        {task: b.items[task]["acc"] for task in ("piqa",)},
    )
    row = only(compare(zero_shot(alone[0], A), zero_shot(alone[1], B)))
    assert row in compare(a, b).rows


def test_metrics_are_taken_as_asked() -> None:
    a = zero_shot(
        {"piqa": [0, 0], "boolq": [0, 1]}, A, norm={"piqa": [1, 0]}, paper={"piqa": [1, 1], "boolq": [0, 0]}
    )
    b = zero_shot({"piqa": [1, 1], "boolq": [1, 1]}, B)
    found = {
        metric: [row.difference for row in compare(a, b, metric).rows][:2]
        for metric in ("acc", "acc_norm", "paper")
    }
    assert found == {
        "acc": [0.5, 1.0],
        "acc_norm": [0.5, 0.5],
        "paper": [1.0, 0.0],
    }  # BoolQ stands before PIQA


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60)
def test_mcnemar_by_counting(won: int, lost: int) -> None:
    flips = won + lost
    few = sum(math.comb(flips, k) for k in range(min(won, lost) + 1))
    assert mcnemar(won, lost) == pytest.approx(min(1.0, 2 * few / 2**flips))
    assert mcnemar(won, lost) == mcnemar(lost, won)


@given(st.integers(0, 500), st.integers(0, 50), st.integers(0, 500))
def test_the_p_value_of_resamples_by_counting(below: int, none: int, above: int) -> None:
    """Twice the share of those on the rarer side, one more counted; those at 0 are on both."""
    differences = np.array([-0.5] * below + [0.0] * none + [2.0] * above)
    p = 2 * (min(below, above) + none + 1) / (below + none + above + 1)
    assert bootstrap_p(differences) == bootstrap_p(-differences) == pytest.approx(min(1.0, p))


def test_a_plain_difference_has_a_small_p_value_and_none_a_large_one() -> None:
    """Of perplexities and of the average, whose p values are those of resamples."""
    generator = np.random.default_rng(3)
    a = generator.uniform(2, 4, 200)
    for shift, low, high in ((0.2, 0, 0.01), (0.0, 0.05, 1)):
        b = a + shift + generator.normal(0, 0.3, 200)
        b = b if shift else b - b.mean() + a.mean()
        row = only(compare(perplexity(a.tolist(), A), perplexity(b.tolist(), B)))
        assert low <= row.p <= high
        assert (row.low <= 0 <= row.high) == (row.p > 0.05)


def test_many_rows_are_resampled_in_parts() -> None:
    values = np.random.default_rng(1).normal(size=(9000, 2))
    sums = resampled_sums(values, 1000, np.random.default_rng(2))  # more weights than are held at once
    assert sums.shape == (1000, 2)
    assert sums.mean(axis=0) == pytest.approx(values.sum(axis=0), abs=12)
    assert sums.std(axis=0) == pytest.approx(values.std(axis=0) * math.sqrt(9000), rel=0.08)


def _changed(record: Any, task: str, **fields: Any) -> Any:
    return replace(record, results={**record.results, task: {**record.results[task], **fields}})


def test_what_is_not_comparable_is_refused_by_name() -> None:
    a, b = all_eight(0.4, model=A), all_eight(0.5, seed=1, model=B)
    text_a, text_b = perplexity([3.0, 4.0], A), perplexity([3.1, 4.1], B)
    for one, other, complaint in [
        (a, _changed(b, "piqa", documents_sha256="0" * 64), "piqa: not comparable: other documents"),
        (a, _changed(b, "boolq", version=3.0), "boolq: not comparable: another version of the task (version 1.0 and 3.0)"),
        (a, text_a, "a is a zero-shot record, a a perplexity record"),
        (zero_shot({"piqa": [1, 0]}, A), zero_shot({"boolq": [1, 0]}, B), "a has piqa, b boolq; nothing in common"),
        (zero_shot({"piqa": [1]}, A), zero_shot({"piqa": [1]}, B), "piqa: 1 document says nothing"),
        (text_a, perplexity([3.1, 4.1], B, protocol="sliding"), "protocols reference and sliding"),
        (text_a, perplexity([3.1, 4.1], B, text_sha256="b" * 64), "other texts"),
        (text_a, replace(text_b, protocol={"name": "reference", "window": 1024}), "window 2048 and 1024"),
        (text_a, perplexity([3.1, 4.1, 5.0], B), "cut the text into other windows"),
        (text_a, perplexity([3.1, 4.1], B, bytes_=9000), "cut the text into other windows"),
        (perplexity([3.0], A), perplexity([3.0], B), "1 window says nothing"),
        (text_a, replace(text_b, items={"wikitext2": {"nats": [3.0, 4.0]}}), "b: wikitext2 has no bytes, tokens, words"),
        (a, replace(b, items={task: {"acc": items["acc"]} for task, items in b.items.items()}), "b: arc_easy has no paper"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="[a-z]") as caught:
            compare(one, other)
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [({"metric": "f1"}, "metric = 'f1'"), ({"samples": 10}, "samples = 10"), ({"seed": -1}, "seed = -1")],
)
def test_bad_settings(setting: dict[str, Any], complaint: str) -> None:
    record = zero_shot({"piqa": [1, 0]}, A)
    with pytest.raises(ValueError, match=complaint):
        compare(record, record, **setting)
