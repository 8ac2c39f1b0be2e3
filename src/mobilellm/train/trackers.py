"""Copies of a run's records for other people's viewers: TensorBoard's files, trackio, wandb."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mobilellm.train.metrics import Record
from mobilellm.train.tables import LogChoice


def check_tracker(log: LogChoice) -> None:
    """Raise ValueError for a tracker that is not installed."""
    if log.tracker != "none" and find_spec(log.tracker) is None:
        raise _missing(log.tracker)


class Trackers:
    """Feed it the loop's records; with the first of them it begins to write, for then the folder is ours.

    Raises ValueError for a tracker that is not installed.
    """

    def __init__(self, run: Path, log: LogChoice, settings: Mapping[str, Any], first_step: int) -> None:
        self._run, self._log, self._settings, self._first_step = run, log, settings, first_step
        self._board = importlib.import_module("tensorboardX") if log.tensorboard else None
        self._module = _installed(log.tracker) if log.tracker != "none" else None
        self._begun = False
        self._writer: Any = None
        self._tracker: Any = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.finish()

    def _begin(self) -> None:
        self._begun = True
        if self._board is not None:
            # What was written after the checkpoint that is resumed from is taken back.
            self._writer = self._board.SummaryWriter(
                str(self._run / "tensorboard"), purge_step=self._first_step + 1
            )
        if self._module is not None:
            self._tracker = self._module.init(
                project=self._log.project,
                name=self._run.name,
                config=dict(self._settings),
                resume="allow",
                # wandb goes on with a run by its id, trackio by its name.
                **({"id": self._id} if self._log.tracker == "wandb" else {}),
            )

    @property
    def _id(self) -> str:
        """The same for the same folder: a run that is resumed is one run there, too."""
        return hashlib.sha256(str(self._run.resolve()).encode()).hexdigest()[:16]

    def update(self, record: Record) -> None:
        if not self._begun:
            self._begin()
        step = record["step"]
        numbers = dict(_numbers(record))
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step)
            for index, (prompt, text) in enumerate(record.get("samples", [])):
                self._writer.add_text(f"sample/{index}", f"**{prompt}**{text}", step)
        if self._tracker is not None and numbers:
            self._tracker.log(numbers, step=step)


def _installed(name: str) -> Any:
    """trackio or wandb: the first speaks the language of the second."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise _missing(name) from None


def _missing(name: str) -> ValueError:
    return ValueError(f"train: log.tracker = {name!r} is not installed; pip install {name}, or choose none")


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    if "loss" in record:
        names = ("loss", "learning_rate", "gradient_norm", "tokens", "seconds", "data_seconds")
        yield from ((f"train/{name}", record[name]) for name in names if name in record)
    yield from ((f"eval/{name}", number) for name, number in record.get("eval", {}).items())
