"""A picture of what quantisation costs: size against KL and perplexity, by scheme and method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mobilellm.report.labels import Label, place_labels
from mobilellm.report.plots import LIGHT, Theme, no_word_about_glyphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOTS_PER_INCH = 140
_MARKS = {"rtn": ("o", 0, "round-to-nearest"), "gptq": ("D", 1, "GPTQ")}
"""Method -> mark, colour of the theme, name in the legend."""


class Spot(NamedTuple):
    label: str
    method: str
    """rtn or gptq"""
    bytes: int
    kl: float
    perplexity: float


def sweep_picture(spots: Sequence[Spot], source: float, title: str, theme: Theme = LIGHT) -> bytes:
    """PNG. `source` is the perplexity of the model they were made of. Below and to the left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9.4, 9.4), dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set_yscale("log")
    upper.set_ylabel("KL from the source, nats a token", color=theme.faint)
    lower.set_ylabel("perplexity", color=theme.faint)
    lower.set_xlabel("MB of tensors", color=theme.faint)
    lower.axhline(source, color=theme.faint, linewidth=1, linestyle="--", label=f"source, {source:.4g}")
    for axes, part in ((upper, "kl"), (lower, "perplexity")):
        for spot in spots:
            mark, colour, name = _MARKS[spot.method]
            axes.plot(
                spot.bytes / 1e6, getattr(spot, part), mark, color=theme.runs[colour], markersize=7, zorder=3,
                label=name,
            )  # fmt: skip
        _dress(axes, theme)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    handles = {name: handle for handle, name in zip(*lower.get_legend_handles_labels(), strict=True)}
    upper.legend(handles.values(), handles.keys(), frameon=False, labelcolor=theme.ink, fontsize=9)
    figure.suptitle(title, color=theme.ink, fontsize=10, parse_math=False)
    with no_word_about_glyphs():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, part in ((upper, "kl"), (lower, "perplexity")):
            at = [(spot.bytes / 1e6, getattr(spot, part)) for spot in spots]
            labels = [
                Label(*place, spot.label, theme.runs[_MARKS[spot.method][1]], 8.0, 3.0)
                for place, spot in zip(at, spots, strict=True)
            ]
            place_labels(axes, labels, at)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.margins(x=0.16, y=0.14)
    axes.tick_params(colors=theme.faint, labelsize=9, length=3)
    axes.grid(color=theme.faint, alpha=0.2, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
