"""A loader whose batches bring what the teacher says of them; before, the teacher's cache is made complete.

The teacher runs once over the very rows that the run will see, found by dealing them all out; later runs and
epochs find them in the cache.
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
from mobilellm.train.teacher import Teacher, top_k
from mobilellm.train.teacher_cache import (
    PART_BYTES,
    CacheError,
    CacheIdentity,
    Row,
    TeacherCache,
    TopK,
    distinct,
    open_cache,
    place_bytes,
)

ROWS_AT_ONCE = 32
"""Given to the teacher together: it sorts their documents by length."""

Progress = Callable[[int, int], None]
"""(rows done, rows to do)."""


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
    """Have `teacher` run over all rows of the first `steps` steps that `cache` lacks; how many these were.

    `loader` deals out the whole steps, not this process's share of them; it is left where it was. All
    processes call this together and share the work. What is done is kept if it is stopped. Raises CacheError
    where rows are missing and there is no teacher, and while another run fills the cache.
    """
    missing = [key for key, _ in distinct(_rows(loader, steps)) if key not in cache]
    if not missing:
        return 0
    if teacher is None:
        raise CacheError(
            f"{cache.directory}: lacks {len(missing):,} rows of this run (other data, longer sequences, more "
            "steps, or it was never finished); name the teacher, distill.teacher, to add them"
        )
    with contextlib.ExitStack() as stack:
        problem = None
        if world.is_first:
            try:
                busy = f"{cache.directory}: another run fills this cache; wait for it, or name another folder"
                stack.enter_context(hold(cache.directory, busy))
            except ValueError as error:
                problem = str(error)
        world.agree(problem)  # and nobody writes before all have seen what is there
        mine = set(missing[world.rank :: world.size])
        _work(cache, loader, steps, teacher, mine, world, progress)
        world.agree(None)
    cache.refresh()
    return len(missing)


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
    waiting: list[tuple[bytes, Row]] = []
    finished = 0

    def write() -> None:
        nonlocal number
        if done:
            cache.write(done, number)
            done.clear()
            number += world.size

    def run() -> None:
        nonlocal finished
        tops = top_k(teacher, [row for _, row in waiting], identity.top_k, identity.temperature)
        done.extend((key, top) for (key, _), top in zip(waiting, tops, strict=True))
        finished += len(waiting)
        waiting.clear()
        progress(finished, len(mine))
        if sum(len(top.ids) for _, top in done) * size >= PART_BYTES:
            write()

    progress(0, len(mine))
    try:
        for key, row in distinct(_rows(loader, steps)):
            if key in mine:
                waiting.append((key, row))
                if len(waiting) == ROWS_AT_ONCE:
                    run()
        if waiting:
            run()
    finally:  # also of a Ctrl-C
        write()


def _rows(loader: Loader, steps: int) -> Iterator[Row]:
    """All rows of so many steps; the loader is put back to where it was."""
    before = loader.state()
    try:
        for _ in range(steps):
            yield from rows_of(loader.next())
    finally:
        loader.restore(before)


def rows_of(batch: Batch) -> Iterator[Row]:
    """As a teacher sees them."""
    for number, tokens in enumerate(batch.tokens):
        segments = None if batch.segments is None else batch.segments[number]
        yield Row(tokens, batch.weights[number] > 0, segments)


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
        """Raises CacheError where the cache is damaged or lacks a row."""
        batch = self._loader.next()
        shape, k = batch.tokens.shape, self._cache.identity.top_k
        tops = [self._cache.read(row) for row in rows_of(batch)]
        ids = np.zeros(
            (*shape, k), tops[0].ids.dtype
        )  # where nothing counts whatever stands there has weight 0
        logs = np.zeros((*shape, k + 1), np.float16)
        for number, (top, weights) in enumerate(zip(tops, batch.weights, strict=True)):
            ids[number, weights > 0] = top.ids
            logs[number, weights > 0] = top.logs
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
