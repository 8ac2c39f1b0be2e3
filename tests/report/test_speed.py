"""Bars of a benchmark: a PNG that shows the numbers, for any names."""

from __future__ import annotations

import numpy as np
import pytest
from test_plots import pixels, size_of

from mobilellm.report.speed import Bar, Panel, speed_picture

BARS = [
    Bar("125m:Q8_0\n32 after 0", "ours", 200.0, "200"),
    Bar("125m:Q8_0\n32 after 0", "theirs", 100.0, "100"),
    Bar("125m:Q8_0\n32 after 512", "ours", 150.0, "150"),
]


def test_it_shows_the_numbers() -> None:
    picture = speed_picture([Panel("Decoding", "tokens a second", BARS)], "a machine")
    assert size_of(picture)[0] == round(8.4 * 130)
    others = [
        speed_picture([Panel("Decoding", "tokens a second", BARS)], "another machine"),
        speed_picture([Panel("Decoding", "tokens a second", [BARS[0], BARS[1]._replace(value=50.0), BARS[2]])], "a machine"),
        speed_picture([Panel("Decoding", "tokens a second", [*BARS[:2], BARS[2]._replace(label="151")])], "a machine"),
    ]  # fmt: skip
    assert all(not np.array_equal(pixels(picture), pixels(other)) for other in others)
    blue = (pixels(picture)[..., 2] > 0.55) & (pixels(picture)[..., 0] < 0.3)
    red = (pixels(picture)[..., 0] > 0.7) & (pixels(picture)[..., 2] < 0.4)
    assert blue.sum() / red.sum() == pytest.approx(350 / 100, rel=0.15)  # as long as the numbers are large


def test_more_panels_make_it_higher() -> None:
    one = size_of(speed_picture([Panel("a", "x", BARS)], ""))
    assert size_of(speed_picture([Panel("a", "x", BARS), Panel("b", "y", BARS[:1])], ""))[1] > one[1] + 100


@pytest.mark.parametrize("name", ["$x_$", "costs $5 and $6 {", "_hidden", "", "x" * 80])
def test_names_are_taken_as_they_are(name: str) -> None:
    assert size_of(speed_picture([Panel(name, name, [Bar(name, name, 1.0, name)])], name))[0] > 0


def test_nothing_measured_is_refused() -> None:
    for panels in ([], [Panel("a", "x", [])]):
        with pytest.raises(ValueError, match="nothing was measured"):
            speed_picture(panels, "")
