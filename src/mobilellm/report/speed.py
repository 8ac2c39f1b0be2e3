"""Pictures of a benchmark as PNG: bars by model and length, a colour for each runtime."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mobilellm.report.plots import LIGHT, Theme, cut, no_word_about_glyphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 130
_WIDTH, _BAR_HEIGHT, _AROUND = 8.4, 0.27, 1.15
"""Inches: of the picture, of a bar, and beside the bars of a panel (title, axis)."""
_GAP = 0.8
"""Between two groups, in bars."""


class Bar(NamedTuple):
    group: str
    """What is compared: bars of one group stand together."""
    runtime: str
    value: float
    label: str
    """Written at the bar's end."""


class Panel(NamedTuple):
    title: str
    unit: str
    bars: Sequence[Bar]


def speed_picture(panels: Sequence[Panel], title: str, theme: Theme = LIGHT) -> bytes:
    """Panels one below the other, their bars in the order given. Texts are taken as they are, long names cut.

    Raises ValueError without a bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not all(panel.bars for panel in panels) or not panels:
        raise ValueError("picture of a benchmark: nothing was measured")
    heights = [_AROUND + _BAR_HEIGHT * _places(panel.bars)[-1] for panel in panels]
    figure = Figure(
        figsize=(_WIDTH, sum(heights) + 0.7), dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.paper
    )
    FigureCanvasAgg(figure)
    runtimes = list(dict.fromkeys(bar.runtime for panel in panels for bar in panel.bars))
    colours = {runtime: theme.runs[number % len(theme.runs)] for number, runtime in enumerate(runtimes)}
    below = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, panel in zip(below, panels, strict=True):
        _draw(axes, panel, colours, theme)
    if len(runtimes) > 1:
        _legend(figure, colours, theme)
    figure.suptitle(title, color=theme.ink, fontsize=10, parse_math=False)
    buffer = io.BytesIO()
    with no_word_about_glyphs():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel, colours: dict[str, str], theme: Theme) -> None:
    places = _places(panel.bars)
    axes.set_facecolor(theme.paper)
    widest = max(bar.value for bar in panel.bars)
    for place, bar in zip(places, panel.bars, strict=True):
        axes.barh(place, bar.value, height=0.86, color=colours[bar.runtime])
        axes.text(
            bar.value + 0.008 * widest, place, bar.label, va="center", fontsize=8, color=theme.ink,
            parse_math=False,
        )  # fmt: skip
    groups: dict[str, list[float]] = {}
    for place, bar in zip(places, panel.bars, strict=True):
        groups.setdefault(bar.group, []).append(place)
    axes.set_yticks([sum(each) / len(each) for each in groups.values()], list(map(_lines_cut, groups)))
    for text in axes.get_yticklabels():
        text.set(parse_math=False, color=theme.ink, fontsize=9)
    axes.set_ylim(places[-1] + 0.7, -0.7)  # the first on top
    axes.set_xlim(0, widest * 1.22)  # room for what is written at the longest bar
    axes.set_title(panel.title, fontsize=9.5, color=theme.ink, loc="left", parse_math=False)
    axes.set_xlabel(panel.unit, color=theme.faint, fontsize=9, parse_math=False)
    axes.tick_params(axis="x", colors=theme.faint, labelsize=9)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=theme.faint, alpha=0.2, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, colours: dict[str, str], theme: Theme) -> None:
    """Below the panels, one for all."""
    from matplotlib.patches import Patch

    # Names come last: matplotlib gives a meaning to dollars, and leaves out a leading underscore.
    legend = figure.legend(
        [Patch(color=colour) for colour in colours.values()], [str(number) for number in range(len(colours))],
        frameon=False, fontsize=8.5, labelcolor=theme.ink, ncols=len(colours), loc="outside lower center",
        handlelength=1, handleheight=1,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), colours, strict=True):
        text.set_parse_math(False)
        text.set_text(cut(name))


def _lines_cut(text: str) -> str:
    return "\n".join(map(cut, text.split("\n")))


def _places(bars: Sequence[Bar]) -> list[float]:
    """Of each bar from the top, in bars."""
    places, place = [], 0.0
    for number, bar in enumerate(bars):
        if number:
            place += 1 if bar.group == bars[number - 1].group else 1 + _GAP
        places.append(place)
    return places
