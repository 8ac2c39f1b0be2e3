"""Pictures of evaluations as PNG: quality against size, beside the published systems; paired differences."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mobilellm.eval.compare import AVERAGE, Comparison, Difference, Ratio
from mobilellm.eval.published import TASKS, TITLES, System, published
from mobilellm.eval.record import Record
from mobilellm.eval.table import METRICS, Measured, scores
from mobilellm.report.labels import Label, place_labels
from mobilellm.report.plots import LIGHT, Theme, no_word_about_glyphs, short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 130
_PUBLISHED_BYTES = 2
"""A weight, of the published systems: bf16 or fp16, as they are distributed or run."""
_LONGEST_NAME = 30


class _Point(NamedTuple):
    name: str
    parameters: float
    bytes: float
    value: float


def accuracy_picture(measured: Sequence[Measured], metric: str, theme: Theme = LIGHT) -> bytes:
    """Mean accuracy of the eight tasks against parameters and against bytes of weights.

    The published systems stand grey behind, at two bytes a weight; the measured coloured. A record without
    all eight tasks has no mean and no point.
    """
    points = []
    for each in measured:
        average = scores(each.record, metric).average
        if average is not None:
            points.append(_point(each, average))
    behind = [_published(system) for system in published()]
    figure, panels = _panels(2, (10.0, 13.0), theme)
    for axes, (x_label, part) in zip(panels, _SIZES, strict=True):
        _scatter(axes, points, behind, part, theme)
        axes.set_xlabel(x_label, color=theme.faint)
        axes.set_ylabel("mean accuracy of eight tasks, %", color=theme.faint)
    said = METRICS[metric].partition(";")[0]
    grey = "Grey: published figures, their sizes at 2 bytes a weight."
    figure.suptitle(f"{grey} Coloured: measured, {said}." if points else grey, color=theme.ink, fontsize=10)
    return _finish(figure, panels, points, behind, theme)


def perplexity_picture(records: Sequence[tuple[str, Record]], text: str, theme: Theme = LIGHT) -> bytes:
    """Bits per byte of one text against parameters and against bytes of weights.

    Raises ValueError unless all records have that text, by one protocol: others are not comparable.
    """
    if not records:
        raise ValueError("picture of perplexity: no record is given")
    protocols = []
    for name, record in records:
        if text not in record.results:
            raise ValueError(f"{name}: has no text {text!r} (it has {', '.join(record.results)})")
        protocols.append((record.results[text]["protocol"], record.results[text]["text_sha256"]))
    if len(set(protocols)) > 1:
        raise ValueError(f"{text}: not comparable: the records are of several protocols or texts")
    points = [
        _Point(name, record.model.parameters, record.model.bytes, record.results[text]["bits_per_byte"])
        for name, record in records
    ]
    figure, panels = _panels(1, (10.0, 4.6), theme)
    for axes, (x_label, part) in zip(panels, _SIZES, strict=True):
        _scatter(axes, points, [], part, theme)
        axes.set_xlabel(x_label, color=theme.faint)
        axes.set_ylabel("bits per byte", color=theme.faint)
    title = f"{text}, protocol {protocols[0][0]}: lower is better"
    figure.suptitle(title, color=theme.ink, fontsize=10, parse_math=False)
    return _finish(figure, panels, points, [], theme)


def difference_picture(comparisons: Sequence[Comparison], theme: Theme = LIGHT) -> bytes:
    """Paired differences with their intervals, a colour a comparison; right of 0 the second is better."""
    if not comparisons:
        raise ValueError("picture of differences: no comparison is given")
    names = list(dict.fromkeys(row.name for each in comparisons for row in each.rows))
    accuracy = comparisons[0].kind in ("zero-shot", "tools")
    height = 1.7 + len(names) * (0.25 + 0.17 * len(comparisons))
    figure, (axes,) = _panels(1, (8.6, height), theme, columns=1)
    for number, each in enumerate(comparisons):
        colour = theme.runs[number % len(theme.runs)]
        shift = 0.0 if len(comparisons) == 1 else 0.5 * (number / (len(comparisons) - 1) - 0.5)
        for row in each.rows:
            middle, low, high = _shown(row)
            y = names.index(row.name) + shift
            heavy = row.name == AVERAGE
            axes.plot(
                [low, high], [y, y], color=colour, linewidth=2.6 if heavy else 1.6, solid_capstyle="butt"
            )
            axes.plot([middle], [y], "D" if heavy else "o", color=colour, markersize=6 if heavy else 5)
        axes.plot([], [], "o-", color=colour, label=str(number))
    axes.axvline(0, color=theme.ink, linewidth=0.9)
    titles = dict(zip(TASKS, TITLES, strict=True))
    axes.set_yticks(range(len(names)), [_cut(titles.get(name, name)) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(
        "difference in accuracy, percentage points (bars: 95 % intervals)" if accuracy
        else "saved bits per byte, % (bars: 95 % intervals)",
        color=theme.faint,
    )  # fmt: skip
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8.5, labelcolor=theme.ink
    )
    for text, each in zip(legend.get_texts(), comparisons, strict=True):
        text.set_parse_math(False)
        text.set_text(f"{_cut(each.b)} against {_cut(each.a)}{f' ({each.metric})' if each.metric else ''}")
    _dress(axes, theme)
    return _png(figure)


_SIZES = (("parameters", "parameters"), ("bytes of weights", "bytes"))


def _shown(row: Difference | Ratio) -> tuple[float, float, float]:
    """Middle, low and high, more being better for B: percentage points, or percent of the bits saved."""
    if isinstance(row, Difference):
        return 100 * row.difference, 100 * row.low, 100 * row.high
    return 100 * (1 - row.ratio), 100 * (1 - row.ratio_high), 100 * (1 - row.ratio_low)


def _point(each: Measured, value: float) -> _Point:
    return _Point(each.name, each.record.model.parameters, each.record.model.bytes, value)


def _published(system: System) -> _Point:
    return _Point(system.name, system.parameters, _PUBLISHED_BYTES * system.parameters, system.average)


def _panels(
    rows: int, size: tuple[float, float], theme: Theme, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of two panels, one below or beside the other, or of `columns`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    drawn = figure.subplots(rows, columns or 2 // rows, squeeze=False)
    return figure, list(drawn.flat)


def _scatter(axes: Axes, points: Sequence[_Point], behind: Sequence[_Point], part: str, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    for point in behind:
        axes.plot(
            getattr(point, part), point.value, "o", color=theme.faint, alpha=0.55, markersize=4, zorder=2
        )
    for number, point in enumerate(points):
        colour = theme.runs[number % len(theme.runs)]
        axes.plot(getattr(point, part), point.value, "o", color=colour, markersize=6.5, zorder=3)
    sizes = [getattr(point, part) for point in (*points, *behind)]
    margin = 1.35 if max(sizes) > 4 * min(sizes) else 2.7  # so that some sizes have a tick
    axes.set_xlim(min(sizes) / margin, max(sizes) * margin)
    _set_y(axes, [point.value for point in (*points, *behind)])
    ticks = [m * 10.0**e for e in range(3, 14) for m in (1, 2, 5)]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value, part)))
    axes.xaxis.set_minor_locator(NullLocator())
    _dress(axes, theme)


def _set_y(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.faint, labelsize=9, length=3)
    axes.grid(color=theme.faint, alpha=0.2, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def _finish(
    figure: Figure, panels: Sequence[Axes], points: Sequence[_Point], behind: Sequence[_Point], theme: Theme
) -> bytes:
    """Name the points, which needs everything else in its place, and draw."""
    with no_word_about_glyphs():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, (_, part) in zip(panels, _SIZES, strict=True):
            at = [(getattr(point, part), point.value) for point in (*points, *behind)]
            ours = [
                Label(*at[i], _cut(point.name), theme.runs[i % len(theme.runs)], 8.5, 3.0, bold=True)
                for i, point in enumerate(points)
            ]
            theirs = [Label(*at[len(points) + i], point.name, theme.faint) for i, point in enumerate(behind)]
            place_labels(axes, [*ours, *theirs], at)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with no_word_about_glyphs():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _size(value: float, part: str) -> str:
    text = short_count(value)
    if part == "parameters":
        return text
    number, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return f"{number} {unit.replace('B', 'G').replace('K', 'k')}B"


def _cut(name: str) -> str:
    """The end of a long name: of a path it is what tells."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
