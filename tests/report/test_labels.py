"""Labels beside points: inside the picture, covering neither each other nor the points, where there is room."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mobilellm.eval.published import published
from mobilellm.report.labels import Label, place_labels


def placed(points: list[tuple[float, float]], names: list[str], size: tuple[float, float] = (10, 6.5)) -> Any:
    """(boxes of the labels, pixels of the points, box of the axes)."""
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), "o")
    canvas.draw()
    figure.set_layout_engine("none")
    place_labels(
        axes, [Label(*point, name, "#000000") for point, name in zip(points, names, strict=True)], points
    )
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    # An annotation's own extent takes in its leader line; the text's is what matters.
    assert [text.get_text() for text in axes.texts] == names
    corners = [_text_box(text, canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == len(corners)
    inside = axes.get_window_extent()
    return np.array(corners), axes.transData.transform(points), (inside.x0, inside.y0, inside.x1, inside.y1)


def _text_box(annotation: Any, renderer: Any) -> tuple[float, float, float, float]:
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    box = Text.get_window_extent(annotation, renderer)
    return box.x0, box.y0, box.x1, box.y1


def overlaps(boxes: Any) -> float:
    """Area that any two have in common, pixels."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    areas = np.clip(high - low, 0, None).prod(axis=2)
    return float(areas[np.triu_indices(len(boxes), 1)].sum())


def test_the_published_systems_do_not_cover_each_other() -> None:
    systems = published()
    points = [(float(np.log(system.parameters)), system.average) for system in systems]
    boxes, dots, (left, bottom, right, top) = placed(points, [system.name for system in systems])
    assert overlaps(boxes) == 0
    assert (boxes[:, 0] >= left - 1).all()
    assert (boxes[:, 1] >= bottom - 1).all()
    assert (boxes[:, 2] <= right + 1).all()
    assert (boxes[:, 3] <= top + 1).all()
    for x, y in dots:  # no label lies on a point
        assert not ((boxes[:, 0] < x) & (x < boxes[:, 2]) & (boxes[:, 1] < y) & (y < boxes[:, 3])).any()


def test_labels_of_points_in_one_place_are_spread() -> None:
    boxes, dots, _ = placed([(1.0, 1.0)] * 5 + [(0.0, 0.0), (2.0, 2.0)], [f"model {i}" for i in range(7)])
    assert overlaps(boxes) == 0
    middles = (boxes[:5, :2] + boxes[:5, 2:]) / 2
    assert (np.abs(middles - dots[0]) < 250).all()  # and stay near


def test_a_label_stands_beside_its_own_point() -> None:
    boxes, dots, _ = placed([(0.0, 0.0), (1.0, 1.0)], ["a", "b"])
    for box, dot in zip(boxes, dots, strict=True):
        middle = (box[:2] + box[2:]) / 2
        assert np.hypot(*(middle - dot)) < 40


def test_there_is_always_a_place() -> None:
    boxes, _, _ = placed([(1.0, 1.0)] * 120, ["the same long name for all of them"] * 120, (2, 2))
    assert len(boxes) == 120
