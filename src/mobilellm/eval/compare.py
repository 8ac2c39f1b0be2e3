"""Is one model better than another? Paired differences of two records, with bootstrap intervals.

Both were asked the same questions, so that what is resampled is the difference a question (or a window of
text) makes, not two accuracies apart: what is hard for both then cancels out. Everything is B against A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilellm.eval.published import TASKS
from mobilellm.eval.record import Record
from mobilellm.eval.resampling import Array, bootstrap_p, generator_of, interval, mcnemar, resampled_sums

AVERAGE = "average"
"""Name of the row over all tasks: their mean, each counting the same, as on the card."""
METRICS = ("paper", "acc_norm", "acc")


@dataclass(frozen=True)
class Difference:
    """Of two accuracies, or of other scores of 0 … 1, in fractions of 1."""

    name: str
    documents: int
    a: float
    b: float
    difference: float
    """B - A."""
    low: float
    high: float
    won: int
    """Documents that B has right and A wrong."""
    lost: int
    p: float
    """Of a difference this large where there is none: of right and wrong answers by McNemar's exact test on
    those won and lost, of the average, of other scores and of turns of conversations by the bootstrap."""


@dataclass(frozen=True)
class Ratio:
    """Of two perplexities of one text, B over A; below 1 B is better."""

    name: str
    protocol: str
    windows: int
    """Windows or documents, the unit that is resampled."""
    a: float
    """Bits per byte."""
    b: float
    difference: float
    """In bits per byte, B - A."""
    low: float
    high: float
    ratio: float
    """Of the bits per byte, B / A."""
    ratio_low: float
    ratio_high: float
    per: str
    """What the perplexities are counted by: "token" where both models cut the text alike, else "word"."""
    perplexity_ratio: float
    perplexity_low: float
    perplexity_high: float
    won: int
    """Windows that B predicts better."""
    lost: int
    p: float
    """By the bootstrap."""


@dataclass(frozen=True)
class Comparison:
    """Of record B with record A."""

    a: str
    b: str
    kind: str
    metric: str
    """Of zero-shot accuracies; "" for other kinds."""
    samples: int
    seed: int
    rows: tuple[Difference, ...] | tuple[Ratio, ...]


def compare(a: Record, b: Record, metric: str = "paper", samples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare B with A, on what both were asked.

    Raises ValueError naming the task or text where the two are not comparable (other documents, another
    version of the task, another protocol), where they have nothing in common, and for bad settings.
    """
    if metric not in METRICS:
        raise ValueError(f"compare: metric = {metric!r} must be one of {', '.join(METRICS)}")
    if samples < 100:
        raise ValueError(f"compare: samples = {samples} must be at least 100 for the ends of an interval")
    if seed < 0:
        raise ValueError(f"compare: seed = {seed} must be at least 0")
    if a.kind != b.kind:
        raise ValueError(
            f"not comparable: {a.model.name} is a {a.kind} record, {b.model.name} a {b.kind} record"
        )
    shared = [name for name in _in_order(a.items) if name in b.items]
    if not shared:
        raise ValueError(
            f"not comparable: {a.model.name} has {_listed(a.items)}, {b.model.name} {_listed(b.items)}; "
            "nothing in common"
        )
    rows: tuple[Difference, ...] | tuple[Ratio, ...]
    if a.kind == "zero-shot":
        rows = _with_average(_differences(a, b, [(task, task, metric) for task in shared], samples, seed))
    elif a.kind == "tools":
        rows = tuple(row for row, _ in _differences(a, b, _of_tools(a, shared), samples, seed))
    else:
        rows = tuple(_ratio(a, b, name, samples, seed) for name in shared)
    shown = metric if a.kind == "zero-shot" else ""
    return Comparison(a.model.name, b.model.name, a.kind, shown, samples, seed, rows)


def _differences(
    a: Record, b: Record, asked: Sequence[tuple[str, str, str]], samples: int, seed: int
) -> Iterator[tuple[Difference, Array]]:
    """Of every (name of the row, task, metric): the difference, and the resampled ones."""
    for name, task, metric in asked:
        right_a, right_b = _answers(a, task, metric), _answers(b, task, metric)
        _check_same_documents(a, b, task, len(right_a), len(right_b))
        change = right_b - right_a
        # Turns of one conversation are drawn together.
        ids = a.items[task].get(f"{metric}_conversation", range(len(change)))
        groups = np.unique(ids, return_inverse=True)[1]
        table = np.array([np.bincount(groups, change), np.bincount(groups)], dtype=np.float64).T
        sums = resampled_sums(table, samples, generator_of(seed, name))
        means = sums[:, 0] / sums[:, 1]
        won, lost = int((change > 0).sum()), int((change < 0).sum())
        is_coin = len(table) == len(change) and set(right_a) | set(right_b) <= {0.0, 1.0}
        yield (
            Difference(
                name, len(change), float(right_a.mean()), float(right_b.mean()), float(change.mean()),
                *interval(means), won, lost, mcnemar(won, lost) if is_coin else bootstrap_p(means),
            ),
            means,
        )  # fmt: skip


def _of_tools(record: Record, tasks: Sequence[str]) -> list[tuple[str, str, str]]:
    return [
        (task if metric == "accuracy" else f"{task}: {metric}", task, metric)
        for task in tasks
        for metric in record.items[task]
        if not metric.endswith("_conversation")
    ]


def _with_average(found: Iterable[tuple[Difference, Array]]) -> tuple[Difference, ...]:
    rows, resampled = zip(*found, strict=True)
    return rows if len(rows) == 1 else (*rows, _overall(rows, np.mean(resampled, axis=0)))


def _overall(rows: Sequence[Difference], means: Array) -> Difference:
    low, high = interval(means)
    return Difference(
        AVERAGE,
        sum(row.documents for row in rows),
        math.fsum(row.a for row in rows) / len(rows),
        math.fsum(row.b for row in rows) / len(rows),
        math.fsum(row.difference for row in rows) / len(rows),
        low,
        high,
        sum(row.won for row in rows),
        sum(row.lost for row in rows),
        bootstrap_p(means),
    )


def _answers(record: Record, task: str, metric: str) -> Array:
    items = record.items[task]
    # lm-eval has no acc_norm where the answers are as long as each other (BoolQ, SIQA, WinoGrande).
    name = "acc" if metric == "acc_norm" and "acc_norm" not in items else metric
    if name not in items:
        raise ValueError(
            f"{record.model.name}: {task} has no {name} by document (it has {_listed(items)}); "
            "score it again, or choose another --metric"
        )
    return np.asarray(items[name], dtype=np.float64)


def _check_same_documents(a: Record, b: Record, task: str, count_a: int, count_b: int) -> None:
    for field, what in (("documents_sha256", "other documents"), ("version", "another version of the task")):
        if (one := a.results[task].get(field)) != (other := b.results[task].get(field)):
            raise ValueError(f"{task}: not comparable: {what} ({field} {_short(one)} and {_short(other)})")
    if count_a != count_b:
        raise ValueError(f"{task}: not comparable: {count_a:,} and {count_b:,} documents")
    if count_a < 2:
        raise ValueError(f"{task}: {count_a} document says nothing of an interval; score at least 2")


def _ratio(a: Record, b: Record, name: str, samples: int, seed: int) -> Ratio:
    protocol = _check_same_text(a, b, name)
    one, other = ({field: np.asarray(r.items[name][field], float) for field in _COUNTS} for r in (a, b))
    # Windows of so many tokens hold other text under another tokenizer: only documents can be paired then.
    if len(one["nats"]) != len(other["nats"]) or not np.array_equal(one["bytes"], other["bytes"]):
        raise ValueError(
            f"{name}: not comparable: the two tokenizers cut the text into other windows; "
            "score both with --protocol document"
        )
    windows = len(one["nats"])
    if windows < 2:
        raise ValueError(f"{name}: {windows} window says nothing of an interval; score at least 2")
    per = "token" if np.array_equal(one["tokens"], other["tokens"]) else "word"
    table = np.stack([one["nats"], other["nats"], one["bytes"], one[f"{per}s"]], axis=1)
    sums = resampled_sums(table, samples, generator_of(seed, name))
    nats_a, nats_b, size, units = table.sum(axis=0)
    bits = math.log(2) * size
    differences = (sums[:, 1] - sums[:, 0]) / (math.log(2) * sums[:, 2])
    better = one["nats"] - other["nats"]
    perplexity_low, perplexity_high = interval((sums[:, 1] - sums[:, 0]) / sums[:, 3])
    return Ratio(
        name, protocol, windows, nats_a / bits, nats_b / bits, (nats_b - nats_a) / bits,
        *interval(differences), nats_b / nats_a, *interval(sums[:, 1] / sums[:, 0]), per,
        math.exp((nats_b - nats_a) / units), math.exp(perplexity_low), math.exp(perplexity_high),
        int((better > 0).sum()), int((better < 0).sum()), bootstrap_p(differences),
    )  # fmt: skip


_COUNTS = ("nats", "bytes", "tokens", "words")


def _check_same_text(a: Record, b: Record, name: str) -> str:
    one, other = a.results[name], b.results[name]
    if one["protocol"] != other["protocol"]:
        raise ValueError(f"{name}: not comparable: protocols {one['protocol']} and {other['protocol']}")
    if one["text_sha256"] != other["text_sha256"]:
        raise ValueError(
            f"{name}: not comparable: other texts (text_sha256 {_short(one['text_sha256'])} and "
            f"{_short(other['text_sha256'])})"
        )
    # Whole documents stay what they are, however much of them a model sees at once.
    for setting in ("documents",) if one["protocol"] == "document" else ("window", "stride", "rows"):
        if (first := a.protocol.get(setting)) != (second := b.protocol.get(setting)):
            raise ValueError(f"{name}: not comparable: {setting} {first} and {second}")
    for record in (a, b):
        if missing := [field for field in _COUNTS if field not in record.items[name]]:
            raise ValueError(
                f"{record.model.name}: {name} has no {_listed(missing)} by window; score it again"
            )
    return str(one["protocol"])


def _in_order(items: dict[str, Any]) -> list[str]:
    known = [task for task in TASKS if task in items]
    return known + [name for name in items if name not in TASKS]


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 16 else text


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(names) or "nothing"
