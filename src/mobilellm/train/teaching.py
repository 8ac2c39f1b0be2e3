"""A loader whose batches bring what the teacher says of them; before, the teacher's cache is made complete.

The teacher runs once over the very passages that the run will see, found by dealing them all out; later
epochs and runs find them in the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.atomic import hold
from mobilellm.data.loader import Batch
from mobilellm.train.distributed import World
from mobilellm.train.feed import Loader
from mobilellm.train.teacher import Teacher, check_context, top_k
from mobilellm.train.teacher_cache import (
    PART_BYTES,
    CacheError,
    CacheIdentity,
    Passage,
    TeacherCache,
    TopK,
    ids_dtype,
    open_cache,
    place_bytes,
)
from mobilellm.train.teacher_cost import Lack

TOKENS_AT_ONCE = 2**14
"""Of passages given to the teacher together, which sorts them by length."""

Progress = Callable[[int, int], None]
"""(passages done, passages to do)."""


def open_together(directory: Path, identity: CacheIdentity | None, world: World) -> TeacherCache:
    """As `open_cache`, which the first process calls before the others."""
    problem, cache = None, None
    if world.is_first:
        try:
            cache = open_cache(directory, identity)
        except (ValueError, OSError) as error:
            problem = str(error)
            if world.size == 1:
                raise
    world.agree(problem)
    return open_cache(directory, identity) if cache is None else cache


def fill(
    cache: TeacherCache,
    loader: Loader,
    steps: int,
    teacher: Teacher | None,
    world: World,
    progress: Progress = lambda done, of: None,
) -> int:
    """Have `teacher` run over what `cache` lacks of the first `steps` steps; how many passages these were.

    `loader` deals out the whole steps, not this process's share of them; it is left where it was. All
    processes call this together and share the work. What is done is kept if it is stopped. Raises CacheError
    where something is missing and there is no teacher, and while another run fills the cache.
    """
    lengths = {key: len(passage.tokens) for key, passage in _distinct(loader, steps)}
    missing = [key for key in lengths if key not in cache]
    if not missing:
        return 0
    if teacher is None:
        raise nobody_to_ask(cache, len(missing))
    check_context(teacher.name, teacher.context, max(lengths[key] for key in missing))
    with contextlib.ExitStack() as stack:
        problem = None
        if world.is_first:
            try:
                busy = f"{cache.directory}: another run fills this cache; wait for it, or name another folder"
                stack.enter_context(hold(cache.directory, busy))
            except ValueError as error:
                problem = str(error)
        world.agree(problem)
        if world.is_first:
            cache.clear_remains()
        cache.refresh()  # another run may have written meanwhile
        missing = [key for key in lengths if key not in cache]
        world.agree(None)  # nobody writes before all have seen what is there
        mine = set(missing[world.rank :: world.size])
        _work(cache, loader, steps, teacher, mine, world, progress)
        world.agree(None)
    cache.refresh()
    return len(missing)


def lack_of(cache: TeacherCache | None, loader: Loader, steps: int) -> Lack:
    """What `fill` would have a teacher run over; `loader` is left where it was."""
    passages = tokens = places = pairs = longest = 0
    for key, passage in _distinct(loader, steps):
        if cache is None or key not in cache:
            length = len(passage.tokens)
            passages, tokens, longest = passages + 1, tokens + length, max(longest, length)
            places, pairs = places + int(passage.counted.sum()), pairs + length * (length + 1) // 2
    return Lack(passages, tokens, places, pairs, longest)


def nobody_to_ask(cache: TeacherCache, count: int) -> CacheError:
    """The error to raise where a cache lacks so many passages and no teacher is named."""
    return CacheError(
        f"{cache.directory}: lacks {count:,} passages of this run (other data, other sequences, more steps, "
        "or it was never finished); name the teacher, distill.teacher, to add them"
    )


def _work(
    cache: TeacherCache,
    loader: Loader,
    steps: int,
    teacher: Teacher,
    mine: set[bytes],
    world: World,
    progress: Progress,
) -> None:
    number, identity = cache.next_number + world.rank, cache.identity
    size = place_bytes(identity.vocab_size, identity.top_k)
    done: list[tuple[bytes, TopK]] = []
    waiting: list[tuple[bytes, Passage]] = []
    finished = 0

    def write() -> None:
        nonlocal number
        if done:
            cache.write(done, number)
            done.clear()
            number += world.size

    def run() -> None:
        nonlocal finished
        tops = top_k(teacher, [passage for _, passage in waiting], identity.top_k, identity.temperature)
        done.extend((key, top) for (key, _), top in zip(waiting, tops, strict=True))
        finished += len(waiting)
        waiting.clear()
        progress(finished, len(mine))
        if sum(len(top.ids) for _, top in done) * size >= PART_BYTES:
            write()

    progress(0, len(mine))
    try:
        for key, passage in _distinct(loader, steps):
            if key in mine:
                waiting.append((key, passage))
                if sum(len(each.tokens) for _, each in waiting) >= TOKENS_AT_ONCE:
                    run()
        if waiting:
            run()
    finally:  # also of a Ctrl-C
        write()


def _distinct(loader: Loader, steps: int) -> Iterator[tuple[bytes, Passage]]:
    """All passages of so many steps, each once, with their keys; the loader is put back to where it was."""
    before, seen = loader.state(), set[bytes]()
    try:
        for _ in range(steps):
            for _, _, passage in passages_of(loader.next()):
                key = passage.key
                if key not in seen:
                    seen.add(key)
                    yield key, passage
    finally:
        loader.restore(before)


def passages_of(batch: Batch) -> Iterator[tuple[int, int, Passage]]:
    """Row, first place in it, and passage, up to the last place that counts; none where none does."""
    for row, (tokens, weights) in enumerate(zip(batch.tokens, batch.weights, strict=True)):
        counted = weights > 0
        starts = [0]
        if batch.segments is not None:
            starts += (np.flatnonzero(np.diff(batch.segments[row])) + 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            places = np.flatnonzero(counted[start:stop])
            if len(places):
                part = slice(start, start + int(places[-1]) + 1)
                yield row, start, Passage(tokens[part], counted[part])


class TaughtLoader:
    """`loader`, with a teacher's top k in every batch. Its state tells the teacher and the mixture, too."""

    def __init__(self, loader: Loader, cache: TeacherCache, weights: dict[str, float]) -> None:
        self._loader, self._cache = loader, cache
        identity = cache.identity
        self._teaching = {
            "teacher": identity.teacher,
            "dtype": identity.dtype,
            "top_k": identity.top_k,
            "temperature": identity.temperature,
            **weights,
        }

    def next(self) -> Batch:
        """Raises CacheError where the cache is damaged or lacks something."""
        batch = self._loader.next()
        shape, identity = batch.tokens.shape, self._cache.identity
        # Where nothing counts whatever stands there has weight 0.
        ids = np.zeros((*shape, identity.top_k), ids_dtype(identity.vocab_size))
        logs = np.zeros((*shape, identity.top_k + 1), np.float16)
        for row, start, passage in passages_of(batch):
            places = start + np.flatnonzero(passage.counted)
            ids[row, places], logs[row, places] = self._cache.read(passage)
        return batch._replace(teacher_ids=ids, teacher_logs=logs)

    def state(self) -> dict[str, Any]:
        return {"distill": dict(self._teaching), "rows": self._loader.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of a run without a teacher, with another one or another mixture."""
        found = state.get("distill")
        if found != self._teaching:
            raise ValueError(
                f"resume: the run has distill = {self._teaching} and the checkpoint {found}; resume with the "
                "same teacher, temperature and weights, or use another folder"
            )
        self._loader.restore(state["rows"])
