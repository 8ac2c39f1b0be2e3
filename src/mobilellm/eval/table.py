"""The card's tables: what is published of a system, what was measured of it here, and the difference.

Everything in percent. Nothing here promises that the two agree: what the authors ran is not published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from mobilellm.eval.published import SIZES, TASKS, TITLES, System, published
from mobilellm.eval.record import Record

METRICS = {
    "paper": "paper: the scoring the authors most likely used, rebuilt",
    "acc_norm": "acc_norm: lm-eval's, by length; acc where a task has no other (BoolQ, SIQA, WinoGrande)",
    "acc": "acc: lm-eval's, without regard to length",
}
"""What a table's own numbers can be, and what to say of them."""

Row = tuple[str, ...]
HEADER: Row = ("", *TITLES, "average")


class Scores(NamedTuple):
    """Of one system."""

    percent: dict[str, float]
    average: float | None
    """Over the eight tasks; None where one is missing."""


@dataclass(frozen=True)
class Measured:
    """A record and the row of the card it belongs to, if any."""

    name: str
    """As the user calls the model."""
    system: System | None
    record: Record


@dataclass(frozen=True)
class Entry:
    """One system of a table with all that was measured of it."""

    system: System | None
    measured: tuple[Measured, ...]


def scores(record: Record, metric: str) -> Scores:
    """What a zero-shot record holds by a metric. Raises ValueError where a task lacks it."""
    percent = {task: 100 * _value(record, task, metric) for task in TASKS if task in record.results}
    return Scores(percent, fmean(percent.values()) if len(percent) == len(TASKS) else None)


def entries(sizes: Sequence[str], measured: Sequence[Measured]) -> list[Entry]:
    """The systems of these tables in the card's order, and those of other tables that were measured.

    Last what the card does not have.
    """
    found = [
        Entry(system, tuple(each for each in measured if each.system is system))
        for system in published()
        if system.size in sizes or any(each.system is system for each in measured)
    ]
    return found + [Entry(None, (each,)) for each in measured if each.system is None]


def by_table(found: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """(title, entries) of each of the card's tables that has any, and of what is in none."""
    titles = [(size, size.upper()) for size in SIZES]
    tables = [(title, [e for e in found if e.system and e.system.size == size]) for size, title in titles]
    tables.append(("not on the card", [entry for entry in found if entry.system is None]))
    return [(title, held) for title, held in tables if held]


def rows(found: Sequence[Entry], metric: str) -> list[Row]:
    """The lines below HEADER: published, and of each measurement ours and the difference."""
    lines: list[Row] = []
    for entry in found:
        if entry.system is not None:
            lines.append(_row(entry.system.name, _printed(entry.system)))
        for each in entry.measured:
            ours = scores(each.record, metric)
            if entry.system is None:
                lines.append(_row(f"{each.name}{_limit(each.record)}", ours))
            else:
                lines.append(_row(f"  ours: {each.name}{_limit(each.record)}", ours))
                lines.append(_row("  difference", differences(entry.system, ours), signed=True))
    return lines


def differences(system: System, ours: Scores) -> Scores:
    """Ours minus the published value, of the tasks that were run."""
    percent = {task: value - system.percent[task] for task, value in ours.percent.items()}
    return Scores(percent, None if ours.average is None else ours.average - system.average)


def table_json(found: Sequence[Entry], metric: str) -> list[dict[str, Any]]:
    """The same as plain values, a dictionary a system."""
    return [
        {
            **_system_json(entry.system),
            "measured": [_measured_json(each, entry.system, metric) for each in entry.measured],
        }
        for entry in found
    ]


def _system_json(system: System | None) -> dict[str, Any]:
    if system is None:
        return {"name": None, "published": None}
    return {
        "name": system.name,
        "size": system.size,
        "hub": system.hub,
        "preset": system.preset,
        "parameters": system.parameters,
        "approximate": system.approximate,
        "published": {**system.percent, "average": system.average},
        "source": system.source,
        "note": system.note,
    }


def _measured_json(each: Measured, system: System | None, metric: str) -> dict[str, Any]:
    ours = scores(each.record, metric)
    change = None if system is None else differences(system, ours)
    return {
        "model": each.name,
        "metric": metric,
        "limit": each.record.protocol.get("limit"),
        "percent": {**ours.percent, "average": ours.average},
        "difference": None if change is None else {**change.percent, "average": change.average},
    }


def _value(record: Record, task: str, metric: str) -> float:
    result: Mapping[str, Any] = record.results[task]
    name = "acc" if metric == "acc_norm" and "acc_norm" not in result else metric
    if name not in result:
        raise ValueError(
            f"{record.model.name}: {task} has no {name}; score it again, or take another --metric"
        )
    return float(result[name])


def _printed(system: System) -> Scores:
    return Scores(system.percent, system.average)


def _row(name: str, values: Scores, signed: bool = False) -> Row:
    numbers = [*(values.percent.get(task) for task in TASKS), values.average]
    form = "{:+.1f}" if signed else "{:.1f}"
    return (name, *("-" if number is None else form.format(number) for number in numbers))


def _limit(record: Record) -> str:
    limit = record.protocol.get("limit")
    return "" if limit is None else f" (first {limit} of each)"
