"""Conversations packed into rows of one length, where none sees another, and dealt out shuffled."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.chat import Conversations
from mobilellm.data.loader import Batch, fewer_tokens
from mobilellm.data.permutation import permuted
from mobilellm.tokenizer import PAD_ID

_PADDING = -1


class ChatRows:
    """Rows of `length` tokens that hold whole conversations; epoch after epoch in another order.

    A conversation of n tokens takes n - 1 places: at each a token is read and the next one predicted. With
    `packing` conversations share rows, put together anew in every epoch so that little is padded (best fit,
    the longest first); in `Batch.segments` each has its own number, so that it stands as if alone. What is
    left of a row is padded, with weight 0 and a number of its own. With `assistant_only` a target counts if
    it is trained, else every one does. Everything follows from `seed`, and takes no more memory than an
    epoch's list of conversations.
    """

    def __init__(
        self,
        conversations: Conversations,
        length: int,
        seed: int,
        packing: bool = True,
        assistant_only: bool = True,
    ) -> None:
        """Raises ValueError for a conversation of more than `length` + 1 tokens."""
        self._conversations, self.length, self._seed = conversations, length, seed
        self._packing, self._assistant_only = packing, assistant_only
        self._places = conversations.lengths - 1
        if len(conversations) and not 1 <= self._places.min() <= self._places.max() <= length:
            raise ValueError(
                f"chat: a conversation has {self._places.max() + 1} tokens, and a sequence reads {length} "
                "and predicts one more; leave it out or lengthen batch.sequence_length"
            )
        self._epoch, self._rows = -1, list[list[int]]()
        self.num_rows = len(self._rows_of(0))

    @property
    def filled(self) -> float:
        """Share of the places of all rows that hold a conversation."""
        return float(self._places.sum() / max(1, self.num_rows * self.length))

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must have alike to see the same rows; JSON."""
        return {
            "conversations": self._conversations.fingerprint,
            "sequence_length": self.length,
            "packing": self._packing,
            "assistant_only": self._assistant_only,
            "seed": self._seed,
        }

    def batch(self, first: int, count: int) -> Batch:
        """Rows first … first + count - 1 of the endless order."""
        positions, segments = self.positions(first, count)
        real = positions != _PADDING
        tokens = np.where(real, self._conversations.tokens[positions], PAD_ID).astype(np.int64)
        following = np.where(real, positions + 1, 0)
        targets = np.where(real, self._conversations.tokens[following], PAD_ID).astype(np.int64)
        counts = self._conversations.trained[following] if self._assistant_only else np.ones_like(real)
        return Batch(tokens, targets, (real & counts).astype(np.float32), segments)

    def positions(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Where in `Conversations.tokens` each token (count, length) of these rows is, -1 for padding; and
        its segment."""
        positions = np.full((count, self.length), _PADDING, dtype=np.int64)
        segments = np.zeros((count, self.length), dtype=np.int32)
        for place in range(count):
            epoch, row = divmod(first + place, self.num_rows)
            filled = 0
            for number, member in enumerate(self._rows_of(epoch)[row]):
                size, start = int(self._places[member]), int(self._conversations.starts[member])
                part = slice(filled, filled + size)
                positions[place, part] = np.arange(start, start + size)
                segments[place, part] = number
                filled += size
                segments[place, filled:] = number + 1
        return positions, segments

    def _rows_of(self, epoch: int) -> list[list[int]]:
        if epoch != self._epoch:
            count = len(self._conversations)
            order = permuted(np.arange(count, dtype=np.int64), count, (self._seed, 0, epoch))
            rows = _best_fit(self._places, order, self.length) if self._packing else [[int(i)] for i in order]
            turns = permuted(np.arange(len(rows), dtype=np.int64), len(rows), (self._seed, 1, epoch))
            self._epoch, self._rows = epoch, [rows[turn] for turn in turns]
        return self._rows


class ChatLoader:
    """Deals out the rows of conversations, epoch after epoch, for ever.

    Of every step's rows rank r takes its equal share, so that the order is the same on any number of devices.
    After `restore(state)` the next batch is bit-identical to what it would have been.
    """

    def __init__(self, rows: ChatRows, sequences_per_step: int, rank: int = 0, world_size: int = 1) -> None:
        """Raises ValueError where a step takes more rows than there are, or ranks cannot share them."""
        if sequences_per_step % world_size:
            raise ValueError(
                f"batch: {sequences_per_step} sequences a step cannot be shared by {world_size} devices"
            )
        if rows.num_rows < sequences_per_step:
            mend = fewer_tokens(rows.num_rows, rows.length, world_size)
            raise ValueError(
                f"chat: the conversations fill {rows.num_rows} sequences, fewer than the "
                f"{sequences_per_step} of one step; give more of them{mend}"
            )
        self.rows = rows
        self._share, self._per_step, self._rank = sequences_per_step // world_size, sequences_per_step, rank
        self._drawn = 0  # rows dealt out so far, over all epochs and ranks

    def next(self) -> Batch:
        """This rank's share of the next step."""
        batch = self.rows.batch(self._drawn + self._rank * self._share, self._share)
        self._drawn += self._per_step
        return batch

    def state(self) -> dict[str, Any]:
        """Where the loader stands and in which data, the same on every rank; JSON."""
        return {"rows": self._drawn, **self.rows.identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after `state`. Raises ValueError if it belongs to other data or another way to pack it."""
        for name, mine in self.rows.identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"resume: the conversations have {name} = {mine} and the checkpoint {state.get(name)}; "
                    "resume with the same files, template, sequence length, packing and seed"
                )
        drawn = state.get("rows")
        if type(drawn) is not int or drawn < 0:
            raise ValueError(f"resume: rows = {drawn!r} in the checkpoint is no number of rows")
        self._drawn = drawn


def _best_fit(places: NDArray[np.int64], order: NDArray[np.int64], length: int) -> list[list[int]]:
    """Conversations put together in rows: the longest first, each where the least room remains after it.

    Of equally long ones `order` decides; how many rows there are does not depend on it.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # its keys, sorted
    for member in order[np.argsort(-places[order], kind="stable")]:
        size = int(places[member])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            room, row = length, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(int(member))
        left = room - size
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return rows
