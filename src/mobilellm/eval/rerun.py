"""Measure a model for the tables, or read the record of it that is there already."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.published import TASKS, System, find, published
from mobilellm.eval.record import Record, read, save

OpenModel = Callable[[str], LanguageModel]
Evaluate = Callable[[LanguageModel, int | None], Record]
"""A model and how many documents of each task to take, at most -> its zero-shot record."""


@dataclass(frozen=True)
class Wanted:
    """A model somebody asks for."""

    model: str
    """What opens it: a Hub id or a directory."""
    system: System | None
    """Its row of the card."""


@dataclass(frozen=True)
class Found:
    """Its record, and where that lies."""

    record: Record
    path: Path
    reused: bool


def wanted(argument: str) -> Wanted:
    """What an argument asks for: a Hub id, a directory, a name or preset of the card, or NAME=DIRECTORY.

    The last says whose row a directory of one's own is. Names of the card win over directories, as presets
    do: write ./125m for a directory called 125m. Raises ValueError for a NAME the card does not have.
    """
    name, equals, model = argument.partition("=")
    if equals and not Path(argument).exists():
        system = find(name)
        if system is None:
            names = ", ".join(each.name for each in published())
            raise ValueError(f"{argument}: {name!r} is not on the card; its systems are {names}")
        if not model:
            raise ValueError(f"{argument}: names no model after the equals sign")
        return Wanted(model, system)
    system = find(argument)
    return Wanted(argument if system is None else system.hub, system)


def measure(
    model: str, folder: Path, limit: int | None, local: bool, open_model: OpenModel, evaluate: Evaluate
) -> Found:
    """The zero-shot record of a model over all eight tasks, from `folder` or made and kept there.

    A record of a Hub id is known by its name, so that the model need not be there any more; one of a
    directory by the fingerprint of what lies in it now. One of another limit is another record, and so is
    one of `local` data, whose texts are not always lm-eval's. Raises what opening and scoring raise.
    """
    if not Path(model).exists():
        for path, record in records(folder, "zero-shot"):
            if record.model.name == model and _fits(record, limit, local):
                return Found(record, path, True)
    opened = open_model(model)
    for path, record in records(folder, "zero-shot"):
        if record.model.fingerprint == opened.identity.fingerprint and _fits(record, limit, local):
            return Found(record, path, True)
    record = evaluate(opened, limit)
    path = _free_path(folder, record, limit)
    save(record, path)
    return Found(record, path, False)


def records(folder: Path, kind: str) -> Iterator[tuple[Path, Record]]:
    """All records of a kind in a folder, by file name; what is no record is passed over."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = read(path)
        except ValueError:
            continue
        if record.kind == kind:
            yield path, record


def _fits(record: Record, limit: int | None, local: bool) -> bool:
    from_files = isinstance(record.protocol.get("data"), dict)
    return record.protocol.get("limit") == limit and from_files == local and set(TASKS) <= set(record.results)


def _free_path(folder: Path, record: Record, limit: int | None) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", record.model.name).strip("-.") or "model"
    stem = f"{name}.zero-shot" + ("" if limit is None else f".first-{limit}")
    number = 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    return path
