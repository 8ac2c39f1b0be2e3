"""Batches of packed windows in an order that depends on the seed alone, not on the number of devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


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
    bit-identical to what it would have been.
    """

    def __init__(
        self,
        stream: NDArray[np.integer[Any]],
        sequence_length: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_windows = (len(stream) - 1) // sequence_length
        if self.num_windows < sequences_per_step:
            raise ValueError(
                f"data: {len(stream)} tokens give {max(0, self.num_windows)} windows of {sequence_length}, "
                f"fewer than the {sequences_per_step} of one step; give more text or a smaller batch"
            )
        if sequences_per_step % world_size:
            raise ValueError(
                f"batch: {sequences_per_step} sequences a step cannot be shared by {world_size} devices"
            )
        self._stream, self._length = stream, sequence_length
        self._per_step, self._seed = sequences_per_step, seed
        self._rank, self._world_size = rank, world_size
        self._window = 0  # windows dealt out so far, over all epochs and ranks
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

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
        return {"window": self._window, "num_windows": self.num_windows, "seed": self._seed}

    def restore(self, state: dict[str, int]) -> None:
        """Go on after `state`. Raises ValueError if it belongs to other data or another seed."""
        mine = self.state()
        for name in ("num_windows", "seed"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"resume: the loader has {name} = {mine[name]} and the checkpoint {state.get(name)}; "
                    "resume with the same data, sequence length and seed"
                )
        self._window = state["window"]

    def _window_at(self, index: int) -> int:
        epoch, position = divmod(index, self.num_windows)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._epoch, self._order = epoch, random.permutation(self.num_windows)
        return int(self._order[position])
