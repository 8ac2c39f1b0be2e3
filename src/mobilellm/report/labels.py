"""Names beside the points of a picture, so that they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Boxes = NDArray[np.float64]
"""(N, 4): left, bottom, right, top, in pixels."""

_DIRECTIONS = (
    (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1),
    (1, 0.5), (-1, 0.5), (1, -0.5), (-1, -0.5),
)  # fmt: skip
"""Where a label may stand from its point, the best first."""
_DISTANCES = (4.0, 9.0, 15.0, 22.0, 30.0)
"""Points between a point's middle and the label; from the second on a thin line leads to it."""


class Label(NamedTuple):
    x: float
    y: float
    text: str
    colour: str
    size: float = 7.5
    clearance: float = 0.0
    """Points of distance more, for a large mark."""
    bold: bool = False


def place_labels(axes: Axes, labels: Sequence[Label], points: Sequence[tuple[float, float]]) -> None:
    """Write each label where it covers least of `points` and of the labels before it. The first choose first.

    The axes must have their final limits, scales and place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    scale = renderer.points_to_pixels(1.0)
    taken = _around(axes.transData.transform(np.asarray(points, float).reshape(-1, 2)), 3.2 * scale)
    inside = axes.get_window_extent(renderer)
    frame = np.array([inside.x0, inside.y0, inside.x1, inside.y1])
    for label in labels:
        text = _text(axes, label)
        text.set_position((label.x, label.y))
        extent = text.get_window_extent(renderer)
        middle = axes.transData.transform((label.x, label.y))
        offsets, boxes = _candidates(middle, extent.width, extent.height, scale, label.clearance)
        own = np.all(np.abs((taken[:, :2] + taken[:, 2:]) / 2 - middle) < 0.5, axis=1)
        cost = _overlap(boxes, taken[~own]).sum(axis=1) + 4 * _outside(boxes, frame)
        # Of places equally free the nearest: a label far from its point is read wrongly.
        best = int(np.argmin(cost + np.arange(len(boxes)) * 0.02 * extent.height))
        text.remove()
        _write(axes, label, tuple(offsets[best] / scale), led=best >= 2 * len(_DIRECTIONS))
        taken = np.concatenate([taken, boxes[best : best + 1]])


def _candidates(
    middle: NDArray[np.float64], width: float, height: float, scale: float, clearance: float
) -> tuple[NDArray[np.float64], Boxes]:
    """Offsets of the label's middle from the point, and the boxes there."""
    offsets = np.array(
        [
            (dx * (width / 2 + (distance + clearance) * scale), dy * (height / 2 + distance * scale))
            for distance in _DISTANCES
            for dx, dy in _DIRECTIONS
        ]
    )
    half = np.array([width / 2, height / 2])
    return offsets, np.concatenate([middle + offsets - half, middle + offsets + half], axis=1)


def _overlap(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """(N, M) areas in common."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=2))


def _outside(boxes: Boxes, frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area of each box that the frame does not hold."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(area - _overlap(boxes, frame[None])[:, 0])


def _around(middles: NDArray[np.float64], half: float) -> Boxes:
    return np.concatenate([middles - half, middles + half], axis=1)


def _text(axes: Axes, label: Label) -> Text:
    return axes.text(
        label.x, label.y, label.text, fontsize=label.size, ha="center", va="center", parse_math=False,
        fontweight="bold" if label.bold else "normal",
    )  # fmt: skip


def _write(axes: Axes, label: Label, offset: tuple[float, float], led: bool) -> None:
    line = {
        "arrowstyle": "-",
        "color": label.colour,
        "alpha": 0.5,
        "linewidth": 0.6,
        "shrinkA": 0,
        "shrinkB": 2,
    }
    axes.annotate(
        label.text, (label.x, label.y), offset, textcoords="offset points", fontsize=label.size, ha="center",
        va="center", color=label.colour, parse_math=False, fontweight="bold" if label.bold else "normal",
        arrowprops=line if led else None, zorder=4,
    )  # fmt: skip
