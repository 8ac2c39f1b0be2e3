"""When a check passes, and what it tells."""

from __future__ import annotations

import math

from mobilellm.export.check import Check, count_check


def test_a_figure_that_is_no_number_is_no_pass() -> None:
    assert Check("x", 0.5, 0.5, "").passed
    assert not Check("x", 0.6, 0.5, "").passed
    assert not Check("x", None, 0.5, "").passed
    assert not Check("x", math.nan, 0.5, "").passed
    assert count_check("x", "faults", ["p", "q", "r", "s"], "").detail == "p; q; r and 1 more"
