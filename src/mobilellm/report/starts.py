"""On what a run was started and gone on with, as its run.json lists it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Start:
    """On what a run went on after a step."""

    step: int
    device: str | None
    world_size: int
    peak_flops: float | None
    """Of one device."""

    @property
    def hardware(self) -> str | None:
        if self.device is None:
            return None
        return f"{self.world_size} × {self.device}" if self.world_size > 1 else self.device


def read_starts(card: Mapping[str, Any]) -> list[Start]:
    """Every start, in order; of a run from before they were listed what is known of the last."""
    listed = [each for each in card.get("starts", []) if isinstance(each, dict)]
    return [_start(each) for each in listed] or [_start(card)]


def _start(values: Mapping[str, Any]) -> Start:
    """From what run.json says; what is of another type is not known."""
    step, size, peak = (values.get(name) for name in ("step", "world_size", "peak_flops"))
    device = values.get("device")
    return Start(
        step=step if type(step) is int else 0,
        device=device if type(device) is str else None,
        world_size=size if type(size) is int and size > 0 else 1,
        peak_flops=float(peak) if isinstance(peak, int | float) and peak > 0 else None,
    )
