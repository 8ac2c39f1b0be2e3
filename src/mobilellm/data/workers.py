"""Processes that examine chunks, and threads that read ahead. The order of results is that of the input."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Full, Queue, SimpleQueue
from typing import Any, Generic, TypeVar

from mobilellm.data.chunks import Chunk
from mobilellm.data.screening import Examined, Screen, ScreenSettings
from mobilellm.tokenizer import Tokenizer

T = TypeVar("T")
_PATIENCE = 0.1
_CHUNKS_AHEAD = 4
_PIPE_BYTES = 2**20
_MOST_CHUNKS = 64


class Workers:
    """`count` processes. Each ends when its pipe does, so none outlives a killed parent."""

    def __init__(self, count: int, settings: ScreenSettings, tokenizer: Tokenizer) -> None:
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        setup = pickle.dumps((settings, tokenizer.pieces, tokenizer.merges))
        for _ in range(count):
            worker = _Worker(setup)
            self._all.append(worker)
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")

    def submit(self, chunks: Sequence[Chunk]) -> Future[list[Examined]]:
        return self._threads.submit(self._ask, chunks)

    def close(self) -> None:
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def _ask(self, chunks: Sequence[Chunk]) -> list[Examined]:
        worker = self._idle.get()
        try:
            return worker.ask(chunks)
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self, setup: bytes) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mobilellm.data.workers"],  # -P: nothing of the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # a Ctrl-C is for the parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        for pipe in (self._to, self._from):
            _widen(pipe.fileno())
        self._setup = setup

    def ask(self, chunks: Sequence[Chunk]) -> list[Examined]:
        try:
            if self._setup:
                self._to.write(self._setup)
                self._setup = b""
            pickle.dump(chunks, self._to, protocol=5)
            self._to.flush()
            answer = pickle.load(self._from)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            what = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise ChildProcessError(
                f"a worker process died ({what}; signal 9 is often want of memory); what is done is kept: "
                "give the same command to go on, perhaps with fewer --workers"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()


class ReadAhead(Generic[T]):
    """The items of several iterators, one iterator after the other, each read in a thread of its own.

    `together` of them are read at a time, a few items ahead. `stop` makes iterating end early.
    """

    def __init__(
        self, makers: Iterable[Callable[[], Iterator[T]]], together: int, stop: threading.Event
    ) -> None:
        self._makers, self._together, self._stop = iter(makers), together, stop
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[T]:
        running: deque[Queue[Any]] = deque()
        try:
            while not self._stop.is_set():
                while len(running) < self._together and (maker := next(self._makers, None)):
                    queue: Queue[Any] = Queue(_CHUNKS_AHEAD)
                    threading.Thread(target=self._fill, args=(maker, queue), daemon=True).start()
                    running.append(queue)
                if not running:
                    return
                try:
                    item = running[0].get(timeout=_PATIENCE)
                except Empty:
                    continue
                if item is None:
                    running.popleft()
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            self._closed.set()

    def _fill(self, maker: Callable[[], Iterator[T]], queue: Queue[Any]) -> None:
        last: BaseException | None = None
        try:
            for item in maker():
                if not self._put(queue, item):
                    return
        except BaseException as error:
            last = error
        self._put(queue, last)

    def _put(self, queue: Queue[Any], item: Any) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(Full):
                queue.put(item, timeout=_PATIENCE)
                return True
        return False


def bundles(chunks: Iterable[Chunk], size: int) -> Iterator[list[Chunk]]:
    """Small files are handed over several at a time."""
    bundle: list[Chunk] = []
    length = 0
    for chunk in chunks:
        bundle.append(chunk)
        length += chunk.size
        if length >= size // 2 or len(bundle) >= _MOST_CHUNKS:
            yield bundle
            bundle, length = [], 0
    if bundle:
        yield bundle


def in_order(
    pool: Workers, tasks: Iterable[list[Chunk]], ahead: int
) -> Iterator[tuple[list[Chunk], list[Examined]]]:
    """Each task with its result, in order; at most `ahead` are on their way."""
    waiting: deque[tuple[list[Chunk], Future[list[Examined]]]] = deque()
    for task in tasks:
        waiting.append((task, pool.submit(task)))
        while len(waiting) > ahead or (waiting and waiting[0][1].done()):
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()


def _widen(descriptor: int) -> None:
    """Let a pipe hold a whole chunk, where the system can: fewer changes from process to process."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _work() -> None:
    """The life of a worker process: chunks come in, what they hold goes out, until the pipe ends."""
    answers, questions = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # what anything prints goes to stderr and not among the answers
    settings, pieces, merges = pickle.load(questions)
    screen = Screen(settings, Tokenizer(pieces, merges))
    while True:
        try:
            chunks = pickle.load(questions)
        except EOFError:
            return
        try:
            answer: Any = [screen.examine(chunk) for chunk in chunks]
        except Exception as error:
            answer = error
        try:
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent is gone


if __name__ == "__main__":
    _work()
