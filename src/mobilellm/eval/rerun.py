"""Measure a model for the tables, or read the record of it that is there already."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from mobilellm.eval.interface import LanguageModel, ModelIdentity
from mobilellm.eval.published import TASKS, System, find, published
from mobilellm.eval.record import Record, read, save


class Opened(Protocol):
    """A model while it is open for scoring."""

    @property
    def model(self) -> LanguageModel: ...


AnyOpened = TypeVar("AnyOpened", bound=Opened)


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
    model: str,
    folder: Path,
    fits: Callable[[Record], bool],
    open_model: Callable[[str], AbstractContextManager[AnyOpened]],
    evaluate: Callable[[AnyOpened], Record],
    by_name: bool = True,
) -> Found:
    """The zero-shot record of a model over all eight tasks, from `folder` or made and kept there.

    A record in the folder is taken if it `fits`, i.e. was made as it would be made now. That of a Hub id is
    known by its name, unless not `by_name`, so that the model need not be there any more; that of a
    directory by the fingerprint of what lies in it now. Raises what opening and scoring raise.
    """
    if by_name and not Path(model).exists():
        for path, record in records(folder, "zero-shot"):
            if record.model.name == model and has_all_tasks(record) and fits(record):
                return Found(record, path, True)
    with open_model(model) as opened:
        now = opened.model.identity
        for path, record in records(folder, "zero-shot"):
            same = record.model.fingerprint == now.fingerprint and _arithmetic(record.model) == _arithmetic(
                now
            )
            if same and has_all_tasks(record) and fits(record):
                return Found(record, path, True)
        record = evaluate(opened)
    path = _free_path(folder, record)
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


def has_all_tasks(record: Record) -> bool:
    return set(TASKS) <= set(record.results)


def _arithmetic(model: ModelIdentity) -> tuple[str, str]:
    return model.backend, model.dtype


def _free_path(folder: Path, record: Record) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", record.model.name).strip("-.") or "model"
    limit = record.protocol.get("limit")
    stem = f"{name}.zero-shot" + ("" if limit is None else f".first-{limit}")
    number = 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    return path
