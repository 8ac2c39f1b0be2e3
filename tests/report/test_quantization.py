from __future__ import annotations

import struct

from mobilellm.report.plots import DARK
from mobilellm.report.quantization import Spot, sweep_picture

SPOTS = [
    Spot("q8_0", "rtn", 1_200_000, 0.0003, 63.38),
    Spot("q4_0", "rtn", 800_000, 0.0156, 64.28),
    Spot("q4_0", "gptq", 800_000, 0.0079, 63.79),
]


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_picture_is_drawn_and_depends_on_the_numbers() -> None:
    one = sweep_picture(SPOTS, 63.3, "a $model$ on a_text")
    assert size_of(one) == (1316, 1316)
    assert one == sweep_picture(SPOTS, 63.3, "a $model$ on a_text")
    moved = [*SPOTS[:2], SPOTS[2]._replace(kl=0.002)]
    assert one != sweep_picture(moved, 63.3, "a $model$ on a_text")
    assert one != sweep_picture(SPOTS, 63.3, "a $model$ on a_text", DARK)
