"""One comparison of an artefact with its source: a name, a figure, a bar."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    name: str
    figure: float | None
    """What was measured; None where the comparison could not be made, which is a failure."""
    bar: float
    """The figure must not be above it."""
    unit: str
    """What the figure counts."""
    detail: str = ""
    """Where it failed, the first places by name; or what was compared."""

    @property
    def passed(self) -> bool:
        return self.figure is not None and self.figure <= self.bar  # NaN is no pass


def count_check(name: str, unit: str, faults: list[str], compared: str) -> Check:
    """A check that no fault is found; the detail names the first few."""
    rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Check(name, len(faults), 0, unit, "; ".join(faults[:3]) + rest if faults else compared)
