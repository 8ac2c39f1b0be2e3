"""Plots of a run as PNG bytes. matplotlib is imported here only, with its off-screen backend."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

_INK, _PALE, _ACCENT = "#1f3a5f", "#b8c7d9", "#d1495b"


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


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    return [
        sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    ]
