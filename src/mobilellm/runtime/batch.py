"""Several texts at once: requests come and go while others run, and each gets what it would get alone.

    with ContinuousBatch(model, slots=4) as batch:
        requests = [batch.add(prompt, max_new_tokens=40) for prompt in prompts]
        for piece in requests[0]:
            print(piece.text, end="", flush=True)

A thread of the batch's own advances all that have a slot by one step at a time, in one pass through the
model: weights are read once for all. A request without a slot waits for one, in the order of coming. A slot
remembers what it read, so that a request which begins like an earlier one is computed only from where it
differs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mobilellm.completion import Completion, NewToken, Piece, RowText, completions
from mobilellm.runtime.decoding import Decoding, limits, window
from mobilellm.runtime.generation import PREFILL_CHUNK, Generation, HeldTokens, Usage, advance, interrupt
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Draw, Sampling

_CHUNK_BESIDE_OTHERS = 64
"""Prompt tokens of one step while others write, who wait for it: each gets a token in between."""


class Request:
    """One text of a batch. Iterating over it gives its pieces as they come, and blocks until they do."""

    def __init__(
        self,
        tokens: Sequence[int],
        text: RowText,
        generation: Callable[[HeldTokens], Generation],
        show: Callable[[Piece], None] | None,
        failed: Callable[[Exception], None] | None,
        wake: Callable[[], None],
    ) -> None:
        """Made by `ContinuousBatch.add`."""
        self._tokens, self._text, self._new_generation, self._show = tokens, text, generation, show
        self._failed, self._wake = failed, wake
        self._generation: Generation | None = None
        self._pieces: list[Piece] = []
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.cancelled = False

    def __iter__(self) -> Iterator[Piece]:
        """From the first piece to the last. Raises what went wrong in the batch, if anything did."""
        count = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._pieces) > count or self._error)  # noqa: B023
                if len(self._pieces) == count:
                    assert self._error is not None
                    raise self._error
            yield self._pieces[count]
            if self._pieces[count].finish:
                return
            count += 1

    def result(self) -> Completion:
        """Wait for the end: all pieces put together."""
        return completions(self, 1)[0]

    def cancel(self) -> None:
        """From any thread: end now, with what there is; `finish` is "cancelled". Its slot is free at once."""
        self.cancelled = True
        if self._generation is not None:
            self._generation.cancel()
        self._wake()

    @property
    def usage(self) -> Usage:
        """What it cost so far."""
        return self._generation.usage if self._generation else Usage(len(self._tokens))

    @property
    def ended(self) -> bool:
        return self._error is not None or bool(self._pieces and self._pieces[-1].finish)

    def begin(self, held: HeldTokens) -> Generation:
        self._generation = self._new_generation(held)
        if self.cancelled:  # meanwhile, by another thread
            self._generation.cancel()
        return self._generation

    def take(self, new: NewToken) -> None:
        """Of the batch's thread. What `show` raises ends the request and is raised to who waits for it."""
        piece = self._text.piece(new)
        try:
            if self._show is not None:
                self._show(piece)
        except Exception as error:
            self.fail(error)
            return
        with self._changed:
            self._pieces.append(piece)
            self._changed.notify_all()
        if piece.finish:
            self._let_go()

    def fail(self, error: Exception) -> None:
        if self._generation is not None:
            self._generation.cancel()
        with self._changed:
            self._error = error
            self._changed.notify_all()
        if self._failed is not None:
            self._failed(error)
        self._let_go()

    def _let_go(self) -> None:
        """Of whoever was told: they may hold this request, and such a ring stays until it is searched for."""
        self._show = self._failed = None

    def gain(self, held: HeldTokens, context: int) -> int:
        """Tokens that would not have to be computed in a slot, less those that it would forget."""
        return 2 * held.shared_with(window(self._tokens, context)) - len(held.tokens)


class ContinuousBatch:
    """`slots` texts are computed at once at most. All methods may be called from any thread."""

    def __init__(self, model: RuntimeModel, slots: int = 4) -> None:
        if slots < 1:
            raise ValueError(f"slots = {slots} must be at least 1")
        self._model, self._context = model, model.engine.config.max_position_embeddings
        self._free = [HeldTokens(model.engine) for _ in range(slots)]
        self._waiting: deque[Request] = deque()
        self._running: dict[Generation, Request] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="mobilellm batch", daemon=True)
        self._thread.start()

    def add(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        decoding: Decoding | None = None,
        show: Callable[[Piece], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
        around: Callable[[Draw], Draw] | None = None,
    ) -> Request:
        """Begin a text as soon as a slot is free. By the batch's thread `show` is called with each piece and
        `failed` with what went wrong, if anything does; no piece follows then.

        The result is that of `RuntimeModel.generate` with this prompt alone; `around` is as in
        `RuntimeModel.generation`. Raises at once ValueError for a prompt that does not fit, and for a batch
        that was closed.
        """
        tokens = self._model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        decoding = decoding or Decoding()
        (limit,) = limits([tokens], max_new_tokens, self._model.engine.config, decoding)
        text = RowText(self._model.tokenizer, stop, first=prompt == "")

        def generation(held: HeldTokens) -> Generation:
            return self._model.generation(
                held, tokens, limit, sampling, decoding, lambda _, token: text.push(token), around=around
            )

        request = Request(tokens, text, generation, show, failed, self._wake)
        with self._changed:
            if self._closed or not self._thread.is_alive():  # a forked process has no such thread
                raise ValueError("this batch was closed, or made by another process; make a new one")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def close(self) -> None:
        """Cancel all requests and give the slots' memory back."""
        with self._changed:
            self._closed = True
            for request in (*self._running.values(), *self._waiting):
                request.cancel()
        self._wake()
        self._thread.join()
        self._free.clear()

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            reading = [request for generation, request in self._running.items() if generation.waiting > 1]
            if any(request.cancelled for request in reading):
                interrupt(self._model.engine)  # a step need not come to its end; the others repeat it

    def _work(self) -> None:
        while self._begin_waiting():
            self._step()

    def _step(self) -> None:
        writes = any(generation.waiting == 1 for generation in self._running)
        chunk = _CHUNK_BESIDE_OTHERS if writes else PREFILL_CHUNK
        try:
            drawn = advance(self._model.engine, self._running, chunk, self._fail)
        except Exception as error:
            self._fail_all(error)
            return
        for generation, new in drawn:
            self._running[generation].take(new)
        with self._changed:
            for generation in [each for each, request in self._running.items() if request.ended]:
                self._free.append(generation.held)
                del self._running[generation]

    def _begin_waiting(self) -> bool:
        """Wait for something to do and give free slots away. False where nothing will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self._closed)
            cancelled = [each for each in self._waiting if each.cancelled]
            for request in cancelled:
                self._waiting.remove(request)
            while self._free and self._waiting:
                request = self._waiting.popleft()
                self._running[request.begin(self._slot_for(request))] = request
            more = bool(self._running or self._waiting or not self._closed)
        for request in cancelled:
            request.take(NewToken(0, None, "cancelled"))
        return more

    def _slot_for(self, request: Request) -> HeldTokens:
        """The one in which more is reused than lost; else the one that is free for longest."""
        gains = [request.gain(held, self._context) for held in self._free]
        best = max(gains)
        return self._free.pop(gains.index(best) if best > 0 else 0)

    def _fail(self, generation: Generation, error: Exception) -> None:
        """Nothing can be drawn from this one's logits, say."""
        self._running[generation].fail(error)

    def _fail_all(self, error: Exception) -> None:
        """The engine found no memory, say: each request is told, and slots begin anew."""
        with self._changed:
            for generation, request in self._running.items():
                request.fail(error)
                generation.held.cut(0)
                self._free.append(generation.held)
            self._running.clear()
