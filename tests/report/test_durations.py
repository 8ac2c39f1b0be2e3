from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mobilellm.report.durations import duration


@given(st.floats(0, 1e11))
def test_what_is_left_out_is_less_than_the_last_unit(seconds: float) -> None:
    units = {"y": 31_557_600, "d": 86_400, "h": 3600, "min": 60, "s": 1}
    words = duration(seconds).replace(",", "").split()
    total = sum(int(count) * units[unit] for count, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(total - seconds) <= max(0.5, (units[words[-1]] if len(words) == 4 else 1))
    assert len(words) in (2, 4)


def test_they_read_well() -> None:
    times = (0, 59.6, 3661, 90_000, 170_361 * 86_400 + 22 * 3600, 1e12, None, math.nan)
    assert [duration(each) for each in times] == [
        "0 s", "1 min 0 s", "1 h 1 min", "1 d 1 h", "466 y 155 d", "31,688 y 32 d", "-", "-",
    ]  # fmt: skip
