"""What a report draws: the panels of one run, or of several compared, as lines over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mobilellm.report.history import History, Numbers

PANEL_NAMES = ("loss", "loss-late", "learning-rate", "gradient-norm", "throughput", "mfu")

_POINTS = 1200
"""Most points a line is drawn with, whatever the length of the run."""

_FAR_APART = 12
"""Runs whose lengths differ more than this many times stand over a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """One line of a panel. `low` and `high` bound what each of its points stands for, and are drawn pale."""

    label: str
    run: int
    """Number of the run it belongs to, which gives its colour."""
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    marks: bool = False
    """Draw a mark at each point: few points, each one measured."""
    value: str = ""
    """Its last value, for the legend."""


@dataclass(frozen=True)
class Panel:
    name: str
    """Of its file, too."""
    title: str
    caption: str
    y_label: str
    lines: list[Line]
    percent: bool = False
    from_zero: bool = False
    logarithmic: bool = False
    logarithmic_x: bool = False
    start: float = 0.0
    """Tokens at the left edge."""
    top: float | None = None
    """Upper edge of the y axis, where lines leave the picture."""


def panels(histories: Sequence[History], labels: Sequence[str]) -> list[Panel]:
    """Loss and its late part, learning rate, gradient norm, tokens/s and, where the peak is known, MFU."""
    loss = _loss(histories, labels)
    made = [
        loss,
        _late(loss),
        _learning_rate(histories, labels),
        _gradient_norm(histories, labels),
        _rate(histories, labels),
        _mfu(histories, labels),
    ]
    ends = [line.x[-1] for line in loss.lines if len(line.x) > 1]
    apart = bool(ends) and max(ends) > _FAR_APART * min(ends)
    return [
        replace(panel, logarithmic_x=apart and panel.name != "loss-late") for panel in made if panel.lines
    ]  # fmt: skip


def smoothing_width(steps: int) -> int:
    """Most steps of the running mean: 1 % of the run, at least 10."""
    return max(10, steps // 100)


def running_mean(values: Numbers, width: int) -> Numbers:
    """Mean of each value and some before it: `width` values in all, fewer near the start.

    There a tenth of what came so far, since the loss falls fast and a wide mean would lag. Values that are
    not finite are left out.
    """
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    after = np.arange(1, len(values) + 1)
    first = after - np.clip(after // 10, 1, width)
    count = counts[after] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, (sums[after] - sums[first]) / count, np.nan)


def groups(length: int, points: int = _POINTS) -> NDArray[np.intp]:
    """Where each of at most `points` groups of neighbours begins, all of about one size."""
    return np.unique(np.linspace(0, length, min(length, points), endpoint=False).astype(np.intp))


def _loss(histories: Sequence[History], labels: Sequence[str]) -> Panel:
    alone = len(histories) == 1
    lines, widths = list[Line](), set[int]()
    for run, history in enumerate(histories):
        tokens, loss = history.columns["tokens"], history.columns["loss"]
        if np.isfinite(loss).any():
            widths.add(width := smoothing_width(len(loss)))
            line = _thin("training" if alone else labels[run], run, tokens, loss, width, band=alone)
            lines.append(replace(line, value=f"{line.y[-1]:.3f}"))
        for name in _held_out_names(history) if alone else ["loss"]:
            points = [
                (at, each.numbers[name])
                for each in history.evaluations
                if name in each.numbers and (at := history.tokens_at(each.step)) is not None
            ]
            if points:
                x, y = np.array(points).T
                words = "held out" + (f" ({name.removesuffix('/loss')})" if name != "loss" else "")
                lines.append(Line(words if alone else "", run, x, y, marks=True, value=f"{y[-1]:.3f}"))
    mean = f"running mean of up to {' / '.join(f'{width:,}' for width in sorted(widths))} steps"
    pale = "; pale: the range of single steps" if alone else ""
    dots = "; dots: held-out text" if any(line.marks for line in lines) else ""
    return Panel("loss", "Loss", f"Training loss, {mean}{pale}{dots}.", "nats per token", lines)


def _late(loss: Panel) -> Panel:
    """The loss again without its first quarter, where it falls so far that the rest looks flat."""
    start = max((line.x[-1] for line in loss.lines), default=0.0) / 4
    lines = [
        replace(
            line,
            **{
                name: values[line.x >= start]
                for name in ("x", "y", "low", "high")
                if (values := getattr(line, name)) is not None
            },
        )
        for line in loss.lines
        if (line.x >= start).sum() > 1
    ]
    caption, top = "The same from a quarter of the longest run on.", _usual_top(lines)
    if top is not None:
        caption += f" What lies above {top:.3g} is only in the picture of all."
    return Panel("loss-late", "Loss, later part", caption, "nats per token", lines, start=start, top=top)


def _usual_top(lines: Sequence[Line]) -> float | None:
    """Where to cut off what few of several runs reach, one that diverged say: the others would look flat."""
    runs: dict[int, list[Numbers]] = {}
    for line in lines:
        runs.setdefault(line.run, []).append(line.y[np.isfinite(line.y)])
    values = [np.concatenate(parts) for parts in runs.values()]
    values = [each for each in values if each.size]
    if len(values) < 3:
        return None
    highest = [float(each.max()) for each in values]
    usual, low = float(np.median(highest)), min(float(each.min()) for each in values)
    top = usual + max(2 * (usual - low), abs(usual) / 4)
    return top if max(highest) > top else None


def _learning_rate(histories: Sequence[History], labels: Sequence[str]) -> Panel:
    lines = [
        _thin(labels[run], run, history.columns["tokens"], history.columns["learning_rate"])
        for run, history in enumerate(histories)
        if np.isfinite(history.columns["learning_rate"]).any()
    ]
    return Panel("learning-rate", "Learning rate", "As scheduled, at each step.", "", lines, from_zero=True)


def _gradient_norm(histories: Sequence[History], labels: Sequence[str]) -> Panel:
    lines = []
    for run, history in enumerate(histories):
        tokens, norm = history.columns["tokens"], history.columns["gradient_norm"]
        if np.isfinite(norm).any():
            width = smoothing_width(len(norm))
            lines.append(_thin(labels[run], run, tokens, norm, width, band=len(histories) == 1))
    caption = "Global norm before clipping; running mean and range as for the loss."
    return Panel("gradient-norm", "Gradient norm", caption, "", lines, logarithmic=_wide(lines))


def _rate(histories: Sequence[History], labels: Sequence[str]) -> Panel:
    lines = [
        Line(labels[run], run, x, rate)
        for run, history in enumerate(histories)
        for x, rate in _rates(history)
    ]
    caption = "All devices together; evaluations and checkpoints are not counted."
    return Panel(
        "throughput", "Throughput", caption, "tokens/s", lines, from_zero=True, logarithmic=_wide(lines)
    )  # fmt: skip


def _mfu(histories: Sequence[History], labels: Sequence[str]) -> Panel:
    lines = [
        Line(labels[run], run, x, share)
        for run, history in enumerate(histories)
        for x, share in _rates(history, history.peak_rate())
        if np.isfinite(share).any()
    ]
    caption = "Share of the devices' dense bf16 peak, counting 6N and causal attention."
    return Panel("mfu", "MFU", caption, "", lines, percent=True, from_zero=True)


def _wide(lines: Sequence[Line]) -> bool:
    """Whether the values are so far apart that only a logarithmic axis shows them all."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines]) if lines else np.ones(1)
    return bool(values.size and values.min() > 0 and values.max() > 20 * values.min())


def _rates(history: History, possible: Numbers | None = None) -> Iterator[tuple[Numbers, Numbers]]:
    """Tokens/s over tokens, each point the tokens of a group of steps over their time.

    With `possible` tokens/s at each step, the share of what was possible in that time.
    """
    seconds = history.columns["seconds"]
    timed = seconds > 0
    if timed.any():
        tokens = history.tokens_a_step[timed]
        seconds = seconds[timed] if possible is None else (seconds * possible)[timed]
        starts = groups(len(seconds), max(2, min(200, len(seconds) // 5)))
        at = history.columns["tokens"][timed][np.append(starts[1:], len(seconds)) - 1]
        yield at, np.add.reduceat(tokens, starts) / np.add.reduceat(seconds, starts)


def _thin(label: str, run: int, x: Numbers, y: Numbers, width: int = 1, band: bool = False) -> Line:
    """A line of at most `_POINTS`: the running mean where each group ends, and the range within the group."""
    starts = groups(len(x))
    last = np.append(starts[1:], len(x)) - 1
    mean = running_mean(y, width) if width > 1 else y
    if not band:
        return Line(label, run, x[last], mean[last])
    low = np.minimum.reduceat(np.where(np.isfinite(y), y, np.inf), starts)
    high = np.maximum.reduceat(np.where(np.isfinite(y), y, -np.inf), starts)
    low, high = np.where(low > high, np.nan, low), np.where(low > high, np.nan, high)
    return Line(label, run, x[last], mean[last], low, high)


def _held_out_names(history: History) -> list[str]:
    """Held-out losses worth a line each: those of the sets where there are several, else the one."""
    names = dict.fromkeys(name for each in history.evaluations for name in each.numbers)
    return [name for name in names if name.endswith("/loss")] or ["loss"]
