"""Batches of packed windows in an order that depends on the seed alone, not on the number of devices."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.permutation import permuted
from mobilellm.tokenizer import BOS_ID

_SAMPLES, _SAMPLE = 64, 1024
"""Blocks of tokens that tell one stream from another without reading all of it, and their length."""


class Stream(Protocol):
    """Tokens in order: a numpy array, or a split of shards."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, where: int) -> Any: ...
    @overload
    def __getitem__(self, where: slice) -> NDArray[np.integer[Any]]: ...


class Batch(NamedTuple):
    """Token ids (N, T), the ids that follow them (N, T), how much each target counts (N, T).

    `segments` (N, T), if documents are to be kept apart, numbers the documents within each row. Of a teacher
    there may be its K likeliest tokens in place of each target, `teacher_ids` (N, T, K), and logarithms of
    their probabilities and that of all others, `teacher_logs` (N, T, K + 1).
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    segments: NDArray[np.int32] | None = None
    teacher_ids: NDArray[np.integer[Any]] | None = None
    teacher_logs: NDArray[np.float16] | None = None


def document_segments(tokens: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """Numbers of the documents of packed rows (N, T), each of which begins with BOS."""
    return np.cumsum(tokens == BOS_ID, axis=1, dtype=np.int32)


def inside_documents(targets: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which targets follow from their own document: all but the BOS that begins the next one."""
    inside: NDArray[np.bool_] = targets != BOS_ID
    return inside


def fewer_tokens(sequences: int, length: int, world_size: int) -> str:
    """The end of a sentence on data that fill too few sequences: the largest batch that they do fill."""
    fit = sequences // world_size * world_size * length
    return f", or make batch.tokens_per_step = {fit}" if fit else ""


class PackedLoader:
    """Cuts streams of tokens into windows and deals them out shuffled, epoch after epoch, for ever.

    Window i of a stream of N tokens reads tokens i*T to i*T + T - 1 and predicts the one after each, after
    the last one the first, so that in an epoch every token is read once and predicted once; what a last
    window lacks is filled up with weight 0. All windows of all streams are one pool, shuffled anew in every
    epoch. With `weights` every stream is a pool of its own, with epochs of its own, and the windows come from
    them in these proportions.

    The global order follows from `seed` and takes no memory; of every step's windows rank r takes its equal
    share. After `restore(state)` the next batch is bit-identical to what it would have been, on any number of
    ranks. With `document_mask` batches carry segments, and the first token of a document is not predicted
    from the document before. Raises ValueError naming the argument.
    """

    def __init__(
        self,
        streams: Stream | Sequence[Stream],
        sequence_length: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] = (),
        document_mask: bool = False,
    ) -> None:
        _check(sequence_length, sequences_per_step, seed, rank, world_size)
        several: list[Stream] = list(streams) if isinstance(streams, list | tuple) else [streams]  # type: ignore[list-item]
        _check_streams(several, weights)
        groups = [[stream] for stream in several] if weights else [several]
        self._pools = [_Pool(group, sequence_length, seed, number) for number, group in enumerate(groups)]
        self.num_windows = sum(pool.num_windows for pool in self._pools)
        if self.num_windows < sequences_per_step:
            raise ValueError(
                f"data: {sum(map(len, several))} tokens give {self.num_windows} windows of "
                f"{sequence_length}, fewer than the {sequences_per_step} of one step; give more text"
                f"{fewer_tokens(self.num_windows, sequence_length, world_size)}"
            )
        self._length, self._per_step = sequence_length, sequences_per_step
        self._rank, self._world_size = rank, world_size
        self._document_mask = document_mask
        self._shares = [weight / sum(weights) for weight in weights] or [1.0]
        self._drawn = [0] * len(
            self._pools
        )  # windows dealt out so far of each pool, over all epochs and ranks
        self._identity: dict[str, Any] = {
            "tokens": [len(stream) for stream in several],
            "fingerprint": [_fingerprint(stream) for stream in several],
            "weights": [float(weight) for weight in weights],
            "sequence_length": sequence_length,
            "document_mask": document_mask,
            "seed": seed,
        }

    def next(self) -> Batch:
        """This rank's share of the next step."""
        share = self._per_step // self._world_size
        mine = slice(self._rank * share, (self._rank + 1) * share)
        rows = np.empty((share, self._length + 1), dtype=np.int64)
        filled = np.empty(share, dtype=np.int64)
        chosen = self._deal()
        for number, pool in enumerate(self._pools):
            places = np.flatnonzero(chosen[mine] == number)
            before = int((chosen[: mine.start] == number).sum())
            first = self._drawn[number] + before
            for place, window in zip(places, pool.windows(first, len(places)), strict=True):
                filled[place] = pool.read(window, rows[place])
        for number in range(len(self._pools)):
            self._drawn[number] += int((chosen == number).sum())
        tokens, targets = rows[:, :-1], rows[:, 1:]
        weights = (np.arange(self._length) < filled[:, None]).astype(np.float32)
        if not self._document_mask:
            return Batch(tokens, targets, weights)
        weights *= inside_documents(targets)
        return Batch(tokens, targets, weights, document_segments(tokens))

    @property
    def epoch(self) -> float:
        """How often the data has been seen; of a mixture, the pool that was seen most often."""
        return max(drawn / pool.num_windows for drawn, pool in zip(self._drawn, self._pools, strict=True))

    def state(self) -> dict[str, Any]:
        """Where the loader stands and in which data, the same on every rank; JSON."""
        return {"windows": list(self._drawn), **self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after `state`. Raises ValueError if it belongs to other data, another length or seed."""
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"resume: the loader has {name} = {mine} and the checkpoint {state.get(name)}; "
                    "resume with the same data, mixture, sequence length and seed"
                )
        drawn = state.get("windows")
        if (
            not isinstance(drawn, list)
            or len(drawn) != len(self._pools)
            or not all(type(count) is int and count >= 0 for count in drawn)
        ):
            raise ValueError(
                f"resume: windows = {drawn!r} in the checkpoint are not {len(self._pools)} numbers of windows"
            )
        self._drawn = list(drawn)

    def _deal(self) -> NDArray[np.int64]:
        """The pool of each window of the next step: always the one that is furthest behind its share."""
        chosen = np.zeros(self._per_step, dtype=np.int64)
        if len(self._pools) == 1:
            return chosen
        drawn, total = list(self._drawn), sum(self._drawn)
        for place in range(self._per_step):
            total += 1
            behind = [share * total - count for share, count in zip(self._shares, drawn, strict=True)]
            number = behind.index(max(behind))
            drawn[number] += 1
            chosen[place] = number
        return chosen


class _Pool:
    """Windows that share epochs and an order."""

    def __init__(self, streams: Sequence[Stream], length: int, seed: int, number: int) -> None:
        self._streams, self._length, self._key = streams, length, (seed, number)
        counts = [-(-len(stream) // length) for stream in streams]
        self._starts = np.concatenate(([0], np.cumsum(counts)))
        self.num_windows = int(self._starts[-1])

    def windows(self, first: int, count: int) -> NDArray[np.int64]:
        """The windows at places first … first + count - 1 of this pool's endless order."""
        places = np.arange(first, first + count, dtype=np.int64)
        epochs, positions = np.divmod(places, self.num_windows)
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            out[inside] = permuted(positions[inside], self.num_windows, (*self._key, int(epoch)))
        return out

    def read(self, window: int, row: NDArray[np.int64]) -> int:
        """Write window tokens and the one after them (T + 1,) into `row`; how many of them count."""
        number = int(np.searchsorted(self._starts, window, side="right")) - 1
        stream = self._streams[number]
        start = int(window - self._starts[number]) * self._length
        part = stream[start : start + self._length + 1]
        row[: len(part)] = part
        if len(part) == self._length + 1:
            return self._length
        row[len(part)] = stream[0]
        row[len(part) + 1 :] = 0
        return len(part)


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


def _check_streams(streams: Sequence[Stream], weights: Sequence[float]) -> None:
    for number, stream in enumerate(streams):
        if len(stream) < 2:
            raise ValueError(f"data: stream {number} has {len(stream)} tokens, which predict nothing")
    if weights and len(weights) != len(streams):
        raise ValueError(f"data: {len(weights)} weights for {len(streams)} streams; give one for each")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"data: weights = {list(weights)} must all be above 0")


def _fingerprint(stream: Stream) -> str | int:
    """A shard split's own (of all its bytes), or a checksum of evenly spaced blocks, both ends too."""
    own = getattr(stream, "fingerprint", None)
    if isinstance(own, str):
        return own
    starts = np.linspace(0, max(0, len(stream) - _SAMPLE), _SAMPLES).astype(np.int64)
    checksum = 0
    for start in np.unique(starts):
        checksum = zlib.crc32(stream[int(start) : int(start) + _SAMPLE].astype("<i8").tobytes(), checksum)
    return checksum
