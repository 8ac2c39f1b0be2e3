"""Batches made ready in the background while the device computes."""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mobilellm.data.loader import Batch
from mobilellm.train.guard import TrainingError


class Loader(Protocol):
    """What the loop asks of data: batches of this process's share, and a place to go on from."""

    def next(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Fed(NamedTuple):
    """A batch on the device, segments on the CPU; the loader's state before it (its address) and after it."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    options: dict[str, Tensor]
    """What else the batch has, by its name: for the loss."""
    total_weight: float
    address: dict[str, Any]
    after: dict[str, Any]  # to go on from
    waited: float  # seconds the loop stood still for it


class Feed:
    """Runs a loader two batches ahead of the loop, in a thread; in pinned memory for a GPU.

    A token outside the vocabulary (of damaged shards) is refused here, where it still has an address: a GPU
    would only say that something was out of bounds.
    """

    def __init__(self, loader: Loader, device: torch.device, vocab_size: int) -> None:
        self._loader, self._device, self._vocab_size = loader, device, vocab_size
        self._ready: queue.Queue[
            tuple[dict[str, Tensor], float, dict[str, Any], dict[str, Any]] | BaseException
        ]
        self._ready = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room for what it may be waiting to put
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def next(self) -> Fed:
        """The next batch. Raises what the loader raised."""
        started = time.perf_counter()
        ready = self._ready.get()
        waited = time.perf_counter() - started
        if isinstance(ready, BaseException):
            raise ready
        parts, total, address, after = ready
        there = {  # a mask is made of segments without waiting for the GPU (model/document_mask.py)
            name: part if name == "segments" else part.to(self._device, non_blocking=True)
            for name, part in parts.items()
        }
        tokens, targets, weights = (there.pop(name) for name in ("tokens", "targets", "weights"))
        return Fed(tokens, targets, weights, there, total, address, after, waited)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                address = self._loader.state()
                batch = self._loader.next()
                self._check(batch, address)
                parts = {
                    name: torch.from_numpy(part) for name, part in batch._asdict().items() if part is not None
                }
                if self._device.type == "cuda":
                    parts = {name: part.pin_memory() for name, part in parts.items()}
                total = float(batch.weights.sum(dtype="float64"))
                self._ready.put((parts, total, address, self._loader.state()))
        except BaseException as error:
            self._ready.put(error)

    def _check(self, batch: Batch, address: dict[str, Any]) -> None:
        low = min(batch.tokens.min(), batch.targets.min())
        high = max(batch.tokens.max(), batch.targets.max())
        if not 0 <= low <= high < self._vocab_size:
            raise TrainingError(
                f"data: token ids {low} … {high} do not lie in the vocabulary of {self._vocab_size}; "
                f"mobilellm shards verify tells damaged files (batch at {address})"
            )
