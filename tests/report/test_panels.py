"""What is drawn: few points that stand for many, and none of them made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import FACTS, evaluation, records, step_record, write_run
from test_plots import pixels, size_of

from mobilellm.report.history import History, read_history
from mobilellm.report.panels import PANEL_NAMES, Panel, groups, panels, running_mean, smoothing_width
from mobilellm.report.plots import DARK, LIGHT, SMALL, WIDE, draw, figure_of, short_count


def by_name(histories: list[History], labels: list[str] | None = None) -> dict[str, Panel]:
    drawn = panels(histories, labels or [str(i) for i in range(len(histories))])
    return {panel.name: panel for panel in drawn}


@given(st.integers(1, 5000), st.integers(1, 300))
def test_groups_cover_everything_evenly(length: int, points: int) -> None:
    starts = groups(length, points)
    sizes = np.diff(np.append(starts, length))
    assert starts[0] == 0
    assert len(starts) == min(length, points)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=60), st.integers(1, 12))
def test_the_running_mean(values: list[float], width: int) -> None:
    means = running_mean(np.array(values), width)
    for index, mean in enumerate(means):
        count = min(width, max(1, (index + 1) // 10))
        part = [value for value in values[index + 1 - count : index + 1] if math.isfinite(value)]
        assert (math.isnan(mean) and not part) or mean == pytest.approx(sum(part) / len(part), abs=1e-6)


def test_a_long_run_is_thinned_and_its_spike_is_kept(tmp_path: Path) -> None:
    lines = [step_record(step, loss=50.0 if step == 7_777 else 3.0) for step in range(1, 20_001)]
    loss = by_name([read_history(write_run(tmp_path, lines))])["loss"].lines[0]
    assert len(loss.x) <= 1200
    assert loss.x[-1] == 20_000_000
    assert loss.high is not None
    assert loss.low is not None
    assert loss.high.max() == 50
    assert loss.low.min() == 3
    assert loss.y.max() == pytest.approx(3 + 47 / smoothing_width(20_000))
    assert loss.y[-1] == pytest.approx(3)


def test_every_panel_of_a_run(tmp_path: Path) -> None:
    drawn = by_name([read_history(write_run(tmp_path))])
    assert tuple(drawn) == PANEL_NAMES
    training, held_out = drawn["loss"].lines
    assert list(held_out.x) == [0, 50_000, 100_000]
    assert list(held_out.y) == [9, 2, 2.5]
    assert (training.label, held_out.label) == ("training", "held out")
    assert held_out.value == "2.500"
    late = drawn["loss-late"].lines
    assert late[0].x[0] == 25_000
    assert list(late[1].x) == [50_000, 100_000]
    rate = drawn["throughput"].lines[0]
    assert rate.y[-1] == pytest.approx(10_000)
    assert rate.y[0] < 1_500  # with the first, slow step
    assert drawn["mfu"].lines[0].y[-1] == pytest.approx(0.04)
    assert "6N and causal attention" in drawn["mfu"].caption


def test_sets_that_are_held_out_have_a_line_each(tmp_path: Path) -> None:
    lines = [*records(), evaluation(100, 2.4, **{"books/loss": 2.2, "wiki/loss": 2.6, "wiki/perplexity": 13})]
    drawn = by_name([read_history(write_run(tmp_path, lines))])
    assert [line.label for line in drawn["loss"].lines] == [
        "training",
        "held out (books)",
        "held out (wiki)",
    ]


def test_runs_compared(tmp_path: Path) -> None:
    """One colour a run, its held-out dots too; MFU only of runs whose peak is known."""
    known = read_history(write_run(tmp_path / "known"))
    unknown = read_history(write_run(tmp_path / "unknown", facts=FACTS | {"peak_flops": None}))
    drawn = by_name([unknown, known], ["unknown", "known"])
    assert [(line.run, line.label, line.marks) for line in drawn["loss"].lines] == [
        (0, "unknown", False), (0, "", True), (1, "known", False), (1, "", True)
    ]  # fmt: skip
    assert [line.label for line in drawn["mfu"].lines] == ["known"]
    assert "mfu" not in by_name([unknown])
    assert not drawn["loss"].logarithmic_x


def runs_that_end_at(folder: Path, *losses: float) -> list[History]:
    """Each falls from 9 to its loss, and stays there."""
    return [
        read_history(
            write_run(
                folder / f"{number}",
                [step_record(step, loss=max(loss, 9 - step / 10)) for step in range(1, 400)],
                facts=FACTS | {"name": f"run {number}"},
            )
        )
        for number, loss in enumerate(losses)
    ]


def test_a_run_that_went_astray_does_not_flatten_the_others(tmp_path: Path) -> None:
    astray = by_name(runs_that_end_at(tmp_path / "a", 2.5, 2.6, 2.7, 8.9))["loss-late"]
    assert astray.top is not None
    assert 2.7 < astray.top < 4
    assert f"above {astray.top:.3g}" in astray.caption
    assert figure_of(astray, LIGHT, WIDE).axes[0].get_ylim()[1] < 4.2
    for losses in ((2.5, 2.6, 2.7, 3.0), (2.5, 8.9)):
        assert by_name(runs_that_end_at(tmp_path / f"{losses}", *losses))["loss-late"].top is None


@pytest.mark.parametrize("size", [WIDE, SMALL])
def test_names_of_many_runs_do_not_cover_their_lines(tmp_path: Path, size: tuple[float, float]) -> None:
    histories = runs_that_end_at(tmp_path, *(2 + i / 10 for i in range(14)))
    panel = panels(histories, [f"a run with a rather long name, number {i}" for i in range(14)])[0]
    figure = figure_of(panel, LIGHT, size)
    figure.draw_without_rendering()
    (legend,), (axes,) = figure.legends, figure.axes
    assert len(legend.get_texts()) == 14
    names, lines = legend.get_window_extent(), axes.get_window_extent()
    assert names.x0 >= lines.x1 or names.y1 <= lines.y0
    assert lines.width * lines.height > 0.3 * figure.bbox.width * figure.bbox.height
    assert not figure_of(panel, LIGHT, size, with_names=False).legends


def test_runs_of_very_different_length_share_a_logarithmic_axis(tmp_path: Path) -> None:
    short = read_history(write_run(tmp_path / "short"))
    long = read_history(write_run(tmp_path / "long", [step_record(step) for step in range(1, 3000)]))
    drawn = by_name([short, long])
    assert drawn["loss"].logarithmic_x
    assert not drawn["loss-late"].logarithmic_x


@pytest.mark.parametrize(
    "lines",
    [
        [evaluation(0, 9.0)],
        [step_record(1)],
        [step_record(1), step_record(2)],
        [step_record(step, loss=math.nan, gradient_norm=math.inf) for step in range(1, 30)],
        [step_record(step, loss=math.nan if step > 5 else 3.0) for step in range(1, 30)],
        [step_record(step, loss=0.0, gradient_norm=0.0, learning_rate=0.0) for step in range(1, 30)],
        [step_record(step, seconds=0.0) for step in range(1, 30)],
        [step_record(step, loss=1e30, gradient_norm=1e-30) for step in range(1, 30)],
        [{"step": step, "tokens": step, "loss": 2.0} for step in range(1, 30)],
    ],
    ids=[
        "evaluation",
        "one",
        "two",
        "nothing finite",
        "blown up",
        "zeros",
        "no time",
        "extremes",
        "loss only",
    ],
)
@pytest.mark.filterwarnings("error")
def test_whatever_a_run_left_can_be_drawn(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    alone = read_history(write_run(tmp_path / "a", lines))
    beside_another = by_name([alone, read_history(write_run(tmp_path / "b"))])
    for panel in (*by_name([alone]).values(), beside_another["loss"], beside_another["throughput"]):
        assert size_of(draw(panel, LIGHT, SMALL)) == (688, 464)


@pytest.mark.parametrize("label", ["$x_$", "_hidden", "a\\frac{", "日本 <b>&", "x" * 500, ""])
@pytest.mark.filterwarnings("error")
def test_labels_are_taken_as_they_are(tmp_path: Path, label: str) -> None:
    runs = [read_history(write_run(tmp_path / name)) for name in "ab"]
    plain, labelled = (draw(by_name(runs, ["other", name])["learning-rate"]) for name in ("a", label))
    assert np.array_equal(pixels(plain), pixels(labelled)) == (label == "a")


def test_themes_and_sizes(tmp_path: Path) -> None:
    panel = by_name([read_history(write_run(tmp_path))])["loss"]
    light, dark, small = draw(panel), draw(panel, DARK), draw(panel, LIGHT, SMALL)
    assert size_of(light) == size_of(dark) == tuple(round(inches * 160) for inches in WIDE)
    assert size_of(small) < size_of(light)
    assert pixels(light)[0, 0, :3].min() == 1
    assert pixels(dark)[0, 0, :3].max() < 0.15


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (2_097_152, "2.1M"), (999_999_999, "1B"), (1.0066e12, "1.01T"),
     (0.002, "0.002"), (-5e6, "-5M")],
)  # fmt: skip
def test_short_counts(number: float, text: str) -> None:
    assert short_count(number) == text


def test_mfu_of_a_run_that_went_on_elsewhere(tmp_path: Path) -> None:
    starts = [
        {"step": 0, "device": "A", "world_size": 4, "peak_flops": 1e12},
        {"step": 50, "device": "B", "world_size": 1, "peak_flops": 1e12},
    ]
    (line,) = by_name([read_history(write_run(tmp_path, facts=FACTS | {"starts": starts}))])["mfu"].lines
    assert line.y[[8, -1]] == pytest.approx([0.02, 0.08])
