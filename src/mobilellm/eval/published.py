"""What the MobileLLM model cards print, of all their systems: `published.toml`, read strictly.

The tasks are named as lm-eval names them, in the card's (corrected) order.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from mobilellm.eval.tasks import EIGHT

TASKS = tuple(task.name for task in EIGHT)
TITLES = tuple(task.column for task in EIGHT)
"""Of the tasks, at the head of a table."""
SIZES = ("125m", "350m", "600m", "1b", "1.5b")
"""The card's five tables."""


@dataclass(frozen=True)
class System:
    """A row of the card."""

    name: str
    size: str
    """The table it stands in."""
    hub: str
    """Id on the Hugging Face Hub."""
    parameters: int
    """Stored weights, a shared one counted once."""
    percent: dict[str, float]
    """Accuracy by task."""
    average: float
    """As printed: their mean, rounded."""
    source: str
    preset: str | None = None
    """Our name of its shape; None for models of others."""
    approximate: bool = False
    """Whether `parameters` is what its authors state rather than an exact count."""
    note: str = ""


@functools.cache
def published() -> tuple[System, ...]:
    """All systems in the card's order. Raises ValueError where the file is not what it must be."""
    return parse((files("mobilellm.eval") / "published.toml").read_text(encoding="utf-8"))


def find(name: str) -> System | None:
    """The system of that name, Hub id or preset, in whatever case; None where the card has none."""
    wanted = name.lower()
    for system in published():
        names = (system.name, system.hub, system.preset or system.name)
        if wanted in (each.lower() for each in names):
            return system
    return None


def parse(text: str) -> tuple[System, ...]:
    """Systems from TOML. Raises ValueError naming system and field of what is unknown, missing or doubled."""
    content = tomllib.loads(text)
    _same_names(content, {"source", "tasks", "systems"}, set(), "the file")
    if tuple(content["tasks"]) != TASKS:
        raise ValueError(f"published figures: tasks = {content['tasks']} must be {list(TASKS)}")
    systems = tuple(_system(row, content["source"]) for row in content["systems"])
    for field in ("name", "hub"):
        values = [getattr(system, field).lower() for system in systems]
        if doubled := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"published figures: {field} {', '.join(sorted(doubled))} stands there twice")
    return systems


_NEEDED = {"name": str, "size": str, "hub": str, "parameters": int, "percent": list, "average": float}
_OPTIONAL = {"preset": str, "approximate": bool, "note": str}


def _system(row: dict[str, Any], source: str) -> System:
    where = str(row.get("name", "a system without a name"))
    _same_names(row, set(_NEEDED), set(_OPTIONAL), where)
    for field, kind in (_NEEDED | _OPTIONAL).items():
        if field in row and type(row[field]) is not kind:
            raise ValueError(
                f"published figures: {where}: {field} = {row[field]!r} must be a {kind.__name__}"
            )
    percent, average = row["percent"], row["average"]
    if len(percent) != len(TASKS) or not all(type(x) is float and 0 < x < 100 for x in [*percent, average]):
        raise ValueError(f"published figures: {where}: percent and average must be 8 + 1 numbers in 0 … 100")
    if row["size"] not in SIZES:
        raise ValueError(
            f"published figures: {where}: size = {row['size']!r} must be one of {', '.join(SIZES)}"
        )
    return System(**{**row, "percent": dict(zip(TASKS, percent, strict=True)), "source": source})


def _same_names(found: dict[str, Any], needed: set[str], optional: set[str], where: str) -> None:
    if wrong := (needed - set(found)) | (set(found) - needed - optional):
        raise ValueError(f"published figures: {where}: missing or not known: {', '.join(sorted(wrong))}")
