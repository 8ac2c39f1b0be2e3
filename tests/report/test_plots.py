"""The picture of a run: a PNG that shows the data, from any records a run can leave."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.report.plots import loss_curve, running_mean

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "eval": {"loss": 6.0}},
    *({"step": step, "tokens": 100 * step, "loss": 6 / step} for step in range(1, 40)),
    {"step": 39, "eval": {"loss": 1.0}},
]


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(png):
        length = struct.unpack(">I", png[at : at + 4])[0]
        body = png[at + 4 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(body)
        kinds.append(body[:4])
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def pixels(png: bytes) -> Any:
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")


def test_it_is_a_png_of_its_size() -> None:
    assert size_of(loss_curve(RECORDS, "a run")) == (910, 520)


def test_it_shows_the_data() -> None:
    """Other losses, another title or an evaluation more is another picture; the same is the same."""
    picture = pixels(loss_curve(RECORDS, "a run"))
    assert np.array_equal(picture, pixels(loss_curve(RECORDS, "a run")))
    others = [
        loss_curve(RECORDS, "another run"),
        loss_curve(RECORDS[:-1], "a run"),
        loss_curve([*RECORDS[:20], RECORDS[20] | {"loss": 3.0}, *RECORDS[21:]], "a run"),
    ]
    assert all(not np.array_equal(picture, pixels(other)) for other in others)
    reds = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.4)
    assert reds.sum() > 50  # the held-out line
    assert not ((pixels(others[1])[..., 0] > 0.7) & (pixels(others[1])[..., 1] < 0.4)).sum() > reds.sum()


@pytest.mark.parametrize(
    "records",
    [
        [],
        RECORDS[:1],
        RECORDS[1:2],
        [*RECORDS, {"step": 99, "eval": {"loss": 2.0}}],  # the step itself was lost
        [*RECORDS, {"step": 39, "eval": {"accuracy": 0.5}}],
        [{"step": 1, "tokens": 10, "loss": math.nan}, {"step": 2, "tokens": 20, "loss": math.inf}],
        [{"step": 1, "tokens": 10**13, "loss": 1e-9}],
    ],
    ids=["none", "first evaluation", "one step", "lost step", "other evaluation", "no numbers", "extremes"],
)
def test_any_records_give_a_picture(records: list[dict[str, Any]]) -> None:
    assert size_of(loss_curve(records, "a run")) == (910, 520)


@pytest.mark.parametrize("title", ["$x_$", "costs $5 and $6 {", "a\\frac", "日本 <b>&", "", "x" * 500])
@pytest.mark.filterwarnings("ignore:Glyph")  # a font that lacks a character draws a box
def test_any_title_is_taken_as_it_is(title: str) -> None:
    assert size_of(loss_curve(RECORDS, title))[0] > 0


def test_no_display_is_needed_and_none_is_opened() -> None:
    script = (
        "import sys\nfrom mobilellm.report.plots import loss_curve\nassert 'matplotlib' not in sys.modules\n"
        "loss_curve([], '')\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.integers(1, 12))
def test_the_running_mean(values: list[float], width: int) -> None:
    means = running_mean(values, width)
    assert len(means) == len(values)
    for index, mean in enumerate(means):
        last = values[: index + 1][-width:]
        assert mean == pytest.approx(math.fsum(last) / len(last), abs=1e-6)
