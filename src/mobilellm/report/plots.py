"""Plots of a run as PNG bytes. matplotlib is imported here only, with its off-screen backend."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mobilellm.report.panels import Panel

_INK, _PALE, _ACCENT = "#1f3a5f", "#b8c7d9", "#d1495b"

WIDE, SMALL = (9.4, 4.0), (4.3, 2.9)
"""Inches of a panel: across a page, and on a phone or as one of several in a row."""
_DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str
    runs: tuple[str, ...]
    """A colour a run; more runs than colours get dashes."""
    held_out: tuple[str, ...]
    """Of the held-out sets of a run that stands alone."""


LIGHT = Theme(
    "#ffffff", "#1c2430", "#5b6675",
    ("#2f5d9b", "#d1495b", "#23875f", "#b26a00", "#7b4fa3", "#0b7f96", "#8a5a3b", "#5f6b7a"),
    ("#d1495b", "#23875f", "#b26a00", "#7b4fa3", "#0b7f96"),
)  # fmt: skip
DARK = Theme(
    "#15181e", "#e6e9ee", "#9aa4b2",
    ("#7fb0ef", "#f0808d", "#5fd0a5", "#f0b95b", "#bb93e6", "#5bcfe6", "#d0a07d", "#a9b4c2"),
    ("#f0808d", "#5fd0a5", "#f0b95b", "#bb93e6", "#5bcfe6"),
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_BORDERS = ("solid", "dashed", "dotted", "double")
"""As a page draws them."""
_MOST_INSIDE = {WIDE: 6, SMALL: 4}
"""More names than these stand beside or below a picture: within they would cover its lines."""
_LONGEST_LABEL = 28
_TICKS = (1, 2, 2.5, 5, 10)


def loss_curve(records: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Training loss (nats a token) over tokens, its running mean, and held-out loss where evaluated.

    `records` are those of a training run; evaluations without a "loss", or of steps that are not in the
    records, have no place in the picture. The title is taken as it is, dollar signs too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    steps = [record for record in records if "loss" in record]
    tokens_at = {0: 0} | {record["step"]: record["tokens"] for record in steps}
    tokens, losses = [record["tokens"] for record in steps], [record["loss"] for record in steps]
    held_out = [
        (tokens_at[record["step"]], record["eval"]["loss"])
        for record in records
        if "loss" in record.get("eval", {}) and record["step"] in tokens_at
    ]

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color=_PALE, linewidth=1, label="training, each step")
    axes.plot(tokens, running_mean(losses, 10), color=_INK, linewidth=2, label="training, mean of 10 steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=_ACCENT, markersize=5, label="held out")
        axes.annotate(
            f"{held_out[-1][1]:.2f}", held_out[-1], textcoords="offset points", xytext=(0, 8), ha="center",
            color=_ACCENT,
        )  # fmt: skip
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(
    panel: Panel, theme: Theme = LIGHT, size: tuple[float, float] = WIDE, with_names: bool = True
) -> bytes:
    """A panel as PNG, names of its lines included or not. They are taken as they are; long ones lose their
    middle."""
    buffer = io.BytesIO()
    with no_word_about_glyphs():
        figure_of(panel, theme, size, with_names).savefig(buffer, format="png")
    return buffer.getvalue()


def figure_of(panel: Panel, theme: Theme, size: tuple[float, float], with_names: bool = True) -> Figure:
    """What `draw` draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    named = _draw_lines(axes, panel, theme)
    if with_names and len(named) > 1:
        _write_names(figure, axes, named, theme, size)
    axes.set_xlabel("tokens", color=theme.faint)
    axes.set_ylabel(panel.y_label, color=theme.faint)
    _set_axes(axes, panel)
    axes.tick_params(colors=theme.faint, labelsize=9, length=3)
    axes.grid(color=theme.faint, alpha=0.2, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    return figure


def stroke(run: int) -> tuple[str, str, str]:
    """How the line of a run looks: its colour on light and on dark paper, and its dashes, in words of CSS."""
    light, dark = (theme.runs[run % len(theme.runs)] for theme in (LIGHT, DARK))
    return light, dark, _BORDERS[run // len(LIGHT.runs) % len(_BORDERS)]


def short_count(number: float) -> str:
    """A count of tokens as the field writes it: 250M, 1.5B, 1T."""
    size = abs(number)
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= unit * 0.9995:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.3g}"


def _draw_lines(axes: Axes, panel: Panel, theme: Theme) -> list[tuple[Artist, str]]:
    """Those that have a name, with it."""
    alone = len({line.run for line in panel.lines}) == 1
    shown, sets = list[tuple["Artist", str]](), 0
    for line in panel.lines:
        colour = theme.runs[line.run % len(theme.runs)]
        dashes = _DASHES[line.run // len(theme.runs) % len(_DASHES)]
        if line.marks:
            if alone:
                colour, sets = theme.held_out[sets % len(theme.held_out)], sets + 1
            size = 4.5 if len(line.x) <= 40 else 2.5
            style = "-" if alone else "none"
            (artist,) = axes.plot(
                line.x, line.y, marker="o", linestyle=style, linewidth=1.4, color=colour, markersize=size,
                zorder=3,
            )  # fmt: skip
        else:
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.28, linewidth=0.8)
            (artist,) = axes.plot(line.x, line.y, linestyle=dashes, linewidth=1.8, color=colour, zorder=2)
            if np.isfinite(line.y).sum() == 1:
                artist.set_marker("o")  # a line of one point would not be seen
        if line.label:
            shown.append((artist, f"{cut(line.label)}  {line.value}".rstrip()))
    return shown


def _write_names(
    figure: Figure, axes: Axes, named: Sequence[tuple[Artist, str]], theme: Theme, size: tuple[float, float]
) -> None:
    # The labels come last: matplotlib gives a meaning to dollars, and leaves out a leading underscore.
    handles, numbers = [artist for artist, _ in named], [str(i) for i in range(len(named))]
    look: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": theme.ink}
    if len(named) <= _MOST_INSIDE[size]:
        legend = axes.legend(handles, numbers, loc="best", **look)
    elif size == WIDE:
        legend = figure.legend(handles, numbers, loc="outside right upper", **look)
    else:
        figure.set_figheight(size[1] + 0.19 * len(named))
        legend = figure.legend(handles, numbers, loc="outside lower left", **look)
    for text, (_, label) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _set_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    counts = FuncFormatter(lambda value, _: short_count(value))
    if panel.logarithmic_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
        axes.set_xlim(left=panel.start)
    axes.xaxis.set_major_formatter(counts)
    if panel.logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter(counts)
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    _set_y_limits(axes, panel)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_TICKS))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if panel.percent else counts)


def _set_y_limits(axes: Axes, panel: Panel) -> None:
    """As the lines need; what the pale range sticks out to, one spike, must not flatten the rest."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in panel.lines])
    for line in panel.lines:
        for bound in (line.low, line.high):
            if bound is not None and (finite := bound[np.isfinite(bound)]).size:
                values = np.append(values, np.quantile(finite, [0.01, 0.99]))
    if not values.size:
        return
    low, high = (0.0 if panel.from_zero else float(values.min())), float(values.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    if panel.top is not None:
        high, margin = panel.top, 0.05 * (panel.top - low)
    if math.isfinite(margin):
        axes.set_ylim(0.0 if panel.from_zero and high >= 0 else low - margin, high + margin)


def cut(label: str) -> str:
    """A label that is too long, without its middle."""
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"


@contextmanager
def no_word_about_glyphs() -> Iterator[None]:
    """A character that no font here has is drawn as a box; that is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    return [
        sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    ]
