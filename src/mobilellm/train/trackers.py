"""Copies of a run's records for other people's viewers: TensorBoard's files, trackio, wandb."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mobilellm.train.metrics import Record
from mobilellm.train.recipe import LogChoice


class Trackers:
    """Feed it the loop's records. Raises ModuleNotFoundError for a tracker that is not installed."""

    def __init__(self, run: Path, log: LogChoice, settings: Mapping[str, Any], first_step: int) -> None:
        self._writer: Any = None
        self._tracker: Any = None
        if log.tensorboard:
            from tensorboardX import SummaryWriter

            # What was written after the checkpoint that is resumed from is taken back.
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        if log.tracker != "none":
            module = importlib.import_module(log.tracker)  # trackio speaks wandb's language
            self._tracker = module.init(
                project=log.project, name=run.name, config=dict(settings), resume="allow"
            )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.finish()

    def update(self, record: Record) -> None:
        step = record["step"]
        numbers = dict(_numbers(record))
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step)
            for index, (prompt, text) in enumerate(record.get("samples", [])):
                self._writer.add_text(f"sample/{index}", f"**{prompt}**{text}", step)
        if self._tracker is not None and numbers:
            self._tracker.log(numbers, step=step)


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    if "loss" in record:
        names = ("loss", "learning_rate", "gradient_norm", "tokens", "seconds", "data_seconds")
        yield from ((f"train/{name}", record[name]) for name in names if name in record)
    yield from ((f"eval/{name}", number) for name, number in record.get("eval", {}).items())
