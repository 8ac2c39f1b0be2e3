"""Copies of a run's records for other people's viewers: TensorBoard's files, trackio, wandb."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mobilellm.accounting import mfu
from mobilellm.train.metrics import Record
from mobilellm.train.tables import LogChoice


def check_tracker(log: LogChoice) -> None:
    """Raise ValueError for a tracker that is not installed."""
    if log.tracker != "none" and not _is_installed(log.tracker):
        raise _missing(log.tracker)


class Trackers:
    """Feed it the loop's records; with the first of them it begins to write, for then the folder is ours.

    `card` is what run.json says of the run: a tracker's settings, and what tokens/s and MFU follow from.
    Raises ValueError for a tracker that is not installed.
    """

    def __init__(self, run: Path, log: LogChoice, card: Mapping[str, Any], first_step: int) -> None:
        self._run, self._log, self._card, self._first_step = run.resolve(), log, card, first_step
        self._board = importlib.import_module("tensorboardX") if log.tensorboard else None
        self._module: Any = _installed(log.tracker) if log.tracker != "none" else None
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
            with _on_standard_error():
                self._module.finish()  # of the run; by its own method trackio would do so once more at exit

    def _begin(self) -> None:
        self._begun = True
        if self._board is not None:
            # What was written after the checkpoint that is resumed from is taken back.
            self._writer = self._board.SummaryWriter(
                str(self._run / "tensorboard"), purge_step=self._first_step + 1
            )
        if self._module is not None:
            with _on_standard_error():
                self._tracker = self._module.init(
                    project=self._log.project,
                    name=self._run.name,
                    config=dict(self._card),
                    resume="allow",
                    # wandb goes on with a run by its id, trackio by its name.
                    **({"id": self._id} if self._log.tracker == "wandb" else {}),
                )

    @property
    def _id(self) -> str:
        """The same for the same folder: a run that is resumed is one run there, too."""
        return hashlib.sha256(str(self._run).encode()).hexdigest()[:16]

    def update(self, record: Record) -> None:
        if not self._begun:
            self._begin()
        step = record["step"]
        numbers = dict(_numbers(record, self._card))
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step)
            for index, (prompt, text) in enumerate(record.get("samples", [])):
                self._writer.add_text(f"sample/{index}", f"**{prompt}**{text}", step)
        if self._tracker is not None and numbers:
            with _on_standard_error():
                self._tracker.log(numbers, step=step)


def _on_standard_error() -> contextlib.AbstractContextManager[Any]:
    """What a tracker has to say: standard output is ours, with --json for one object."""
    return contextlib.redirect_stdout(sys.stderr)


def _installed(name: str) -> Any:
    """trackio or wandb: the first speaks the language of the second."""
    if not _is_installed(name):
        raise _missing(name)
    with _on_standard_error():
        return importlib.import_module(name)


def _is_installed(name: str) -> bool:
    """A mere folder of that name, as wandb leaves where it ran, is a package, too, but of no file."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def _missing(name: str) -> ValueError:
    return ValueError(f"train: log.tracker = {name!r} is not installed; pip install {name}, or choose none")


def _numbers(record: Record, card: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "loss" in record:
        names = (
            "loss", "learning_rate", "gradient_norm", "tokens", "seconds", "data_seconds",
            "peak_memory_bytes",
        )  # fmt: skip
        yield from ((f"train/{name}", record[name]) for name in names if name in record)
        if record.get("seconds") and "tokens_per_step" in card:
            rate = card["tokens_per_step"] / record["seconds"]
            yield "train/tokens_per_second", rate
            if card.get("peak_flops"):
                peak = card["peak_flops"] * card["world_size"]
                yield "train/mfu", mfu(card["flops_per_token"], rate, peak)
    yield from ((f"eval/{name}", number) for name, number in record.get("eval", {}).items())
