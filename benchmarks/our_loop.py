"""The first steps of our loop, without the checkpoint at a run's end. Imports torch: for workers only."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm.model.transformer import MobileLLM
from mobilellm.train.feed import Loader
from mobilellm.train.loop import train
from mobilellm.train.settings import (
    BatchSettings,
    CheckpointSettings,
    ComputeSettings,
    OptimSettings,
    ScheduleSettings,
    TrainSettings,
)


class _Enough(Exception):  # noqa: N818
    """Raised after the last step, so that no checkpoint is written."""


def first_steps(
    model: MobileLLM,
    loader: Loader,
    steps: int,
    sequences: int,
    length: int,
    optim: OptimSettings,
    compute: ComputeSettings,
    on_record: Callable[[dict[str, Any]], bool | None],
    micro_batch: int | None = None,
) -> None:
    """`on_record` is told of each of the `steps`, of a run that would have ten times as many, or says enough.

    A step is `sequences` times `length` tokens at a constant learning rate: one micro-batch, or several of
    `micro_batch` sequences.
    """
    count = 0

    def told(record: dict[str, Any]) -> None:
        nonlocal count
        enough = on_record(record)
        count += 1
        if enough or count == steps:
            raise _Enough

    settings = TrainSettings(
        steps=10 * steps,
        batch=BatchSettings(
            tokens_per_step=sequences * length, sequence_length=length, micro_batch=micro_batch or sequences
        ),
        optim=optim,
        schedule=ScheduleSettings(warmup_steps=0, final_fraction=1.0),
        compute=compute,
        checkpoint=CheckpointSettings(every=10**9),
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        train(model, loader, settings, Path(folder), on_record=told)
