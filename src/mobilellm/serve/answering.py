"""The way into the batch and back: counted and bounded, and what it draws brought into the event loop.

one request -> Answer -> n choices, each a request of the batch
the batch's thread -> Handover -> Answer.deliver -> `take`
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mobilellm.completion import Piece
from mobilellm.runtime.batch import ContinuousBatch
from mobilellm.runtime.batch import Request as BatchRequest
from mobilellm.runtime.decoding import Decoding
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Sampling
from mobilellm.serve.drawing import Drawing, TokenChances
from mobilellm.serve.errors import ApiError
from mobilellm.serve.settings import Limits

_log = logging.getLogger(__name__)
_TICK = 0.008
"""Seconds for which tokens are collected: two or three of a fast model. Nobody sees that."""
_DECODING = Decoding(context="stop")


@dataclass(frozen=True)
class Choice:
    """One text that is wanted."""

    tokens: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str]
    drawing: Drawing


class Arrival(NamedTuple):
    """What came of one choice: a piece, with how likely its token was where that was asked; or an error."""

    choice: int
    piece: Piece | None
    chances: TokenChances | None
    error: Exception | None


class Times(NamedTuple):
    """Of an answer, in seconds and tokens a second; None where there is too little to tell."""

    to_first_token: float | None
    """From the request's coming on, waiting included."""
    prompt_rate: float | None
    rate: float | None


class Answer:
    """All choices of one request on their way. Its methods are called in the event loop."""

    def __init__(self, choices: Sequence[Choice], handover: Handover, ended: Callable[[Answer], None]) -> None:
        """`ended` is called after each choice's end."""
        self.choices = choices
        self.started = time.perf_counter()
        self.unfinished = len(choices)
        self.completion_tokens = 0
        self.last_arrival = self.started
        self._ended, self._handover = ended, handover
        self._here: list[Arrival] = []
        self._fault: ApiError | None = None
        self._something = asyncio.Event()
        self._requests: list[BatchRequest] = []

    def begin(self, batch: ContinuousBatch) -> None:
        for number, choice in enumerate(self.choices):
            self._requests.append(self._added(batch, number, choice))

    def drop_what_did_not_begin(self) -> int:
        missing = len(self.choices) - len(self._requests)
        self.unfinished -= missing
        return missing

    def _added(self, batch: ContinuousBatch, number: int, choice: Choice) -> BatchRequest:
        is_first = True

        def show(piece: Piece) -> None:
            nonlocal is_first
            chances = choice.drawing.next_chances() if piece.token is not None else None
            self._handover.put(self, Arrival(number, piece, chances, None), is_first or bool(piece.finish))
            is_first = False

        def failed(error: Exception) -> None:
            self._handover.put(self, Arrival(number, None, None, error), True)

        return batch.add(
            choice.tokens, choice.sampling, choice.max_new_tokens, choice.stop, _DECODING,
            show=show, failed=failed, around=choice.drawing,
        )  # fmt: skip

    def deliver(self, arrival: Arrival) -> None:
        self.last_arrival = time.perf_counter()
        self._here.append(arrival)
        if arrival.error is not None:
            self.fail(_fault(arrival.error))
        elif arrival.piece is not None and arrival.piece.token is not None:
            self.completion_tokens += 1
        if arrival.piece is None or arrival.piece.finish:
            self.unfinished -= 1
            self._ended(self)
        self._something.set()

    async def take(self) -> list[Arrival]:
        """What came since the last time, at least one. Raises ApiError for what went wrong meanwhile."""
        await self._something.wait()
        self._something.clear()
        here, self._here = self._here, []
        if self._fault is not None:
            raise self._fault
        return here

    def fail(self, fault: ApiError) -> None:
        """End here: `take` raises it."""
        self._fault = self._fault or fault
        self.cancel()
        self._something.set()

    def cancel(self) -> None:
        """Every choice ends at the next token, with what there is."""
        for request in self._requests:
            if not request.ended:
                request.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Of all different prompts; choices of one prompt share it."""
        return sum(map(len, {id(choice.tokens): choice.tokens for choice in self.choices}.values()))

    @property
    def reused_tokens(self) -> int:
        return sum(request.usage.reused for request in self._requests)

    def times(self) -> Times:
        began = [each.drawing.began for each in self.choices if each.drawing.began is not None]
        first = [each.drawing.first for each in self.choices if each.drawing.first is not None]
        if not first:
            return Times(None, None, None)
        read, reading = self.prompt_tokens - self.reused_tokens, min(first) - min(began)
        more, writing = self.completion_tokens - len(first), self.last_arrival - min(first)
        return Times(
            min(first) - self.started,
            read / reading if read > 0 and reading > 0 else None,
            more / writing if more > 0 and writing > 0 else None,
        )


class Handover:
    """From the batch's thread into the event loop: what is urgent at once, the rest every few milliseconds.

    A wake of the loop for every token would take a twentieth of a fast model's time from it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._incoming: deque[tuple[Answer, Arrival]] = deque()
        self._ticking = False

    def put(self, answer: Answer, arrival: Arrival, urgent: bool) -> None:
        """From any thread."""
        self._incoming.append((answer, arrival))
        if urgent or not self._ticking:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._incoming:
            answer, arrival = self._incoming.popleft()
            answer.deliver(arrival)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = False  # before it is looked: what comes from now on wakes the loop itself
        if self._incoming:
            self._deliver()


class Answering:
    """The one batch of the server, with a bounded queue before it."""

    def __init__(self, model: RuntimeModel, limits: Limits) -> None:
        self.limits = limits
        self.closing = False
        self._batch = ContinuousBatch(model, limits.slots)
        self._answers: set[Answer] = set()
        self._handover: Handover | None = None
        self._texts = 0
        self._recent_seconds = 1.0

    @property
    def running(self) -> int:
        return min(self._texts, self.limits.slots)

    @property
    def waiting(self) -> int:
        return self._texts - self.running

    @property
    def capacity(self) -> int:
        return self.limits.slots + self.limits.queue

    def begin(self, choices: Sequence[Choice]) -> Answer:
        """Raises ApiError 429 with Retry-After where the queue is full, 400 for what never fits in it."""
        if self.closing:
            raise ApiError(503, "the server is ending", "shutting_down", headers={"Retry-After": "5"})
        if len(choices) > self.capacity:
            raise ApiError(
                400, f"n: {len(choices)} texts were asked for at once; {self.capacity} is the most", None, "n"
            )
        if self._texts + len(choices) > self.capacity:
            raise ApiError(
                429,
                f"{self.running} texts are being written and {self.waiting} wait; ask again later",
                "queue_full",
                headers={"Retry-After": str(self._seconds_until_room())},
            )
        self._handover = self._handover or Handover()
        answer = Answer(choices, self._handover, self._ended)
        self._texts += len(choices)
        self._answers.add(answer)
        try:
            answer.begin(self._batch)
        except ValueError as error:
            answer.cancel()
            self._texts -= answer.drop_what_did_not_begin()
            self._answers.discard(answer)
            raise ApiError(400, str(error)) from None
        return answer

    def _ended(self, answer: Answer) -> None:
        self._texts -= 1
        if not answer.unfinished:
            self._answers.discard(answer)
            self._recent_seconds += 0.2 * (time.perf_counter() - answer.started - self._recent_seconds)

    def _seconds_until_room(self) -> int:
        return max(1, min(60, round(self._recent_seconds / self.limits.slots * max(1, self.waiting))))

    async def end(self, grace: float) -> None:
        """Let what is being written come to its end for `grace` seconds; then cancel it."""
        self.closing = True
        patience = time.monotonic() + grace
        while self._answers and time.monotonic() < patience:
            await asyncio.sleep(0.05)
        for answer in [*self._answers]:
            answer.fail(ApiError(503, "the server ended before this answer did", "shutting_down"))

    def close(self) -> None:
        self._batch.close()


def _fault(error: Exception) -> ApiError:
    if isinstance(error, ApiError):  # of the request's schema, which became too complex on the way
        return error
    if isinstance(error, MemoryError):
        return ApiError(503, str(error), "out_of_memory", headers={"Retry-After": "5"})
    _log.error("a text failed", exc_info=error)
    return ApiError(500, "the model could not go on; the server's own log says why", "internal_error")
