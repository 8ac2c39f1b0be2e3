"""Batches of packed windows in an order that depends on the seed alone, not on the number of devices."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.shards import Split

_SAMPLES, _SAMPLE = 64, 1024
"""Blocks of tokens that tell one stream from another without reading all of it, and their length."""


class Batch(NamedTuple):
    """Token ids (N, T), the ids that follow them (N, T), and how much each target counts (N, T)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]


class PackedLoader:
    """Cuts a stream of tokens into windows and deals them out shuffled, epoch after epoch, for ever.

    Window i covers tokens [i*T, (i+1)*T] (one more, for the last target), so an epoch predicts every token
    but the first of the stream, and a tail shorter than T, exactly once. The global order follows from
    `seed`; of every step's windows rank r takes its equal share. After `restore(state)` the next batch is
    bit-identical to what it would have been. Raises ValueError naming the argument.
    """

    def __init__(
        self,
        stream: NDArray[np.integer[Any]] | Split,
        sequence_length: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check(sequence_length, sequences_per_step, seed, rank, world_size)
        self.num_windows = max(0, len(stream) - 1) // sequence_length
        if self.num_windows < sequences_per_step:
            raise ValueError(
                f"data: {len(stream)} tokens give {self.num_windows} windows of {sequence_length}, "
                f"fewer than the {sequences_per_step} of one step; give more text or a smaller batch"
            )
        self._stream, self._length = stream, sequence_length
        self._per_step, self._seed = sequences_per_step, seed
        self._rank, self._world_size = rank, world_size
        self._window = 0  # windows dealt out so far, over all epochs and ranks
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._identity = {
            "tokens": len(stream),
            "fingerprint": _fingerprint(stream),
            "sequence_length": sequence_length,
            "seed": seed,
        }

    def next(self) -> Batch:
        """This rank's share of the next step."""
        share = self._per_step // self._world_size
        first = self._window + self._rank * share
        starts = [self._window_at(i) * self._length for i in range(first, first + share)]
        self._window += self._per_step
        rows = np.stack([self._stream[start : start + self._length + 1] for start in starts]).astype(np.int64)
        return Batch(rows[:, :-1], rows[:, 1:], np.ones((share, self._length), dtype=np.float32))

    @property
    def epoch(self) -> float:
        return self._window / self.num_windows

    def state(self) -> dict[str, int]:
        """Where the loader stands and in which data, the same on every rank."""
        return {"window": self._window, **self._identity}

    def restore(self, state: dict[str, int]) -> None:
        """Go on after `state`. Raises ValueError if it belongs to other data, another length or seed."""
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"resume: the loader has {name} = {mine} and the checkpoint {state.get(name)}; "
                    "resume with the same data, sequence length and seed"
                )
        window = state.get("window")
        if type(window) is not int or window < 0:
            raise ValueError(f"resume: window = {window!r} in the checkpoint is no number of windows")
        self._window = window

    def _window_at(self, index: int) -> int:
        epoch, position = divmod(index, self.num_windows)
        if epoch != self._epoch:
            # Sorting raw bits: numpy keeps those the same in every version, but not its permutations.
            keys = np.random.PCG64([self._seed, epoch]).random_raw(self.num_windows)
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
        return int(self._order[position])


def _check(sequence_length: int, sequences_per_step: int, seed: int, rank: int, world_size: int) -> None:
    for name, value in (
        ("sequence_length", sequence_length),
        ("sequences_per_step", sequences_per_step),
        ("world_size", world_size),
    ):
        if value < 1:
            raise ValueError(f"batch: {name} = {value} must be at least 1")
    if seed < 0:
        raise ValueError(f"batch: seed = {seed} must be 0 or above")
    if not 0 <= rank < world_size:
        raise ValueError(f"batch: rank = {rank} must lie in 0 … {world_size - 1} (world_size = {world_size})")
    if sequences_per_step % world_size:
        raise ValueError(
            f"batch: {sequences_per_step} sequences a step cannot be shared by {world_size} devices"
        )


def _fingerprint(stream: NDArray[np.integer[Any]] | Split) -> int:
    """Checksum of evenly spaced blocks, both ends too: sees other data, but not every changed token."""
    starts = np.linspace(0, max(0, len(stream) - _SAMPLE), _SAMPLES).astype(np.int64)
    checksum = 0
    for start in np.unique(starts):
        checksum = zlib.crc32(stream[start : start + _SAMPLE].astype("<i8").tobytes(), checksum)
    return checksum
