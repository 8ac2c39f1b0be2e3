"""How long something takes, as people say it."""

from __future__ import annotations

import math

_UNITS = (("y", 31_557_600), ("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
"""Seconds of each; a year of 365.25 days."""


def duration(seconds: float | None) -> str:
    """Years, days, hours, minutes, seconds, the two largest: 2 d 3 h, 4 min 5 s; - for what is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    rest, parts = round(seconds), list[str]()
    for unit, size in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts or size == 1:
            parts.append(f"{count:,} {unit}")
    return " ".join(parts[:2])
