"""Sequences in flight: what each is fed next, what is drawn from its logits, and when it ends.

`advance` is one step of any number of them: a piece of prompt for those that still read theirs, a token, or a
token and guesses at the next ones, for those that write; one pass through the model for all. What a sequence
draws does not depend on the others, nor on how it was cut into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mobilellm.completion import FinishReason, NewToken
from mobilellm.config import ModelConfig
from mobilellm.runtime.decoding import Decoding, Limit, window, window_start
from mobilellm.runtime.engine import CancelledError
from mobilellm.runtime.kv_cache import CacheState, Floats
from mobilellm.runtime.prompt_lookup import PromptLookup
from mobilellm.sampling import Draw
from mobilellm.tokenizer import EOS_ID

PREFILL_CHUNK = 256
"""Tokens of one step: the attention of each against all before it is held at once."""


class Engine(Protocol):
    """What runs a model, ReferenceModel or NativeModel say, with caches of its own."""

    config: ModelConfig

    def new_cache(self, capacity: int | None = None) -> Any: ...

    def forward(self, tokens: NDArray[np.integer], cache: Any) -> Floats: ...

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], Any]]) -> Floats: ...

    def logits(self, states: Floats) -> Floats: ...


@runtime_checkable
class Interruptible(Protocol):
    """An engine whose running call another thread can end: it raises CancelledError, no cache grown."""

    def cancel(self) -> None: ...


def interrupt(engine: Engine) -> None:
    """End the pass that runs, where the engine can: `advance` repeats it for those that still want it."""
    if isinstance(engine, Interruptible):
        engine.cancel()


class HeldTokens:
    """An engine's cache and the tokens it holds, so that another sequence is fed from where it differs."""

    def __init__(self, engine: Engine, capacity: int | None = None) -> None:
        self.cache = engine.new_cache(capacity)
        self.tokens: list[int] = []

    def shared_with(self, tokens: Sequence[int]) -> int:
        """How many tokens need not be computed; the last one always is, for what follows it."""
        pairs = zip(self.tokens, tokens[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def restore(self, tokens: list[int], state: CacheState) -> None:
        self.cache.restore(state)
        self.tokens = tokens

    def cut(self, length: int) -> None:
        """Forget everything after `length` tokens, and what the cache holds beyond those known here."""
        del self.tokens[length:]
        self.cache.truncate(len(self.tokens))


@dataclass
class Usage:
    """What one generation cost, in tokens."""

    prompt: int
    reused: int = 0
    """Of the prompt, those that were in the cache already."""
    fed: int = 0
    """Computed, wrong guesses among them."""
    guessed: int = 0
    accepted: int = 0
    """Of the guessed, those that were right."""


class Feed(NamedTuple):
    tokens: list[int]
    wanted: int
    """After how many of the last tokens it has to be known what follows."""


class Generation:
    """One sequence that is being continued. `until(number, token)` says whether a token ends it ("stop")."""

    def __init__(
        self,
        held: HeldTokens,
        prompt: Sequence[int],
        vocabulary: int,
        context: int,
        draw: Draw,
        limit: Limit,
        decoding: Decoding,
        until: Callable[[int, int], bool] | None = None,
        number: int = 0,
    ) -> None:
        """`held` is cut back to what it shares with the prompt; `vocabulary`: ids below it may be drawn."""
        self.held = held
        self.finish: FinishReason | None = None
        self.usage = Usage(len(prompt))
        self._tokens, self._vocabulary, self._context = list(prompt), vocabulary, context
        self._draw_from, self._until, self._number = draw, until, number
        self._left, self._at_the_end = limit
        self._lookup, self._most_guesses = PromptLookup(), decoding.prompt_lookup
        self._cancelled = False
        self._to_feed: list[int] = []
        self._begin_window()
        self.usage.reused = len(held.tokens)

    @property
    def waiting(self) -> int:
        """Tokens that have to be fed before the next can be drawn."""
        return len(self._to_feed)

    def cancel(self) -> None:
        """From any thread: end at the next step."""
        self._cancelled = True

    def ended(self) -> NewToken | None:
        """The last word of a sequence that was cancelled, once."""
        if not self._cancelled or self.finish:
            return None
        self.finish = "cancelled"
        return NewToken(self._number, None, self.finish)

    def feed(self, most: int) -> Feed:
        """What the next step feeds, `most` tokens of a prompt at most. Nothing changes by asking."""
        if len(self._to_feed) > most:
            return Feed(self._to_feed[:most], 0)
        guesses = self._guesses() if len(self._to_feed) == 1 else []
        return Feed(self._to_feed + guesses, 1 + len(guesses))

    def take(self, feed: Feed, logits: Floats) -> list[NewToken]:
        """Go on after `feed` was fed, with `logits` (wanted, V): the tokens drawn."""
        self.usage.fed += len(feed.tokens)
        self.held.tokens += feed.tokens
        if not feed.wanted:
            self._to_feed = self._to_feed[len(feed.tokens) :]
            return []
        guesses = feed.tokens[len(feed.tokens) - feed.wanted + 1 :]
        self.usage.guessed += len(guesses)
        drawn = []
        for its_logits, guess in zip(logits, [*guesses, None], strict=True):
            drawn.append(self._draw(its_logits))
            if self.finish or drawn[-1].token != guess:
                break
        self.usage.accepted += len(drawn) - 1
        self.held.cut(len(self.held.tokens) - len(guesses) + len(drawn) - 1)
        if window_start(len(self._tokens), self._context) == self._start:
            self._to_feed = self._tokens[-1:]
        elif not self.finish:
            self._begin_window()
        return drawn

    def _begin_window(self) -> None:
        tokens = window(self._tokens, self._context)
        self._start = window_start(len(self._tokens), self._context)
        self.held.cut(self.held.shared_with(tokens))
        self._to_feed = tokens[len(self.held.tokens) :]

    def _guesses(self) -> list[int]:
        """Every guess that is right saves a pass; none may lie beyond the end or the context."""
        room = self._context - len(self.held.tokens) - 1
        most = min(self._most_guesses, self._left - 1, room)
        return self._lookup.guess(self._tokens, most) if most > 0 else []

    def _draw(self, logits: Floats) -> NewToken:
        token = self._draw_from(logits[: self._vocabulary])
        self._tokens.append(token)
        self._left -= 1
        if token == EOS_ID:
            self.finish = "eos"
        elif self._until is not None and self._until(self._number, token):
            self.finish = "stop"
        elif self._left == 0:
            self.finish = self._at_the_end
        return NewToken(self._number, token, self.finish)


def advance(
    engine: Engine,
    generations: Iterable[Generation],
    most: int = PREFILL_CHUNK,
    failed: Callable[[Generation, Exception], None] | None = None,
) -> list[tuple[Generation, NewToken]]:
    """One step of all that have not ended: the tokens drawn, possibly none yet. At most about `most` are fed.

    Those that write come first, then short prompts. A sequence that was cancelled ends here. What goes wrong
    where one draws is raised, or given to `failed`, and the others go on.
    """
    generations = sorted((each for each in generations if not each.finish), key=lambda each: each.waiting)
    new = [(each, last) for each in generations if (last := each.ended())]
    feeds: list[tuple[Generation, Feed]] = []
    for each in generations:
        room = most - sum(len(feed.tokens) for _, feed in feeds)
        if not each.finish and (room > 0 or each.waiting == 1):
            feeds.append((each, each.feed(max(1, room))))
    if feeds:
        for (each, feed), logits in zip(feeds, _logits(engine, feeds), strict=False):
            try:
                new += [(each, drawn) for drawn in each.take(feed, logits)]
            except Exception as error:
                if failed is None:
                    raise
                failed(each, error)
    return new


def _logits(engine: Engine, feeds: Sequence[tuple[Generation, Feed]]) -> list[Floats]:
    """Logits (wanted, V) of each sequence after its tokens; nothing at all where a pass was cancelled."""
    wanted = [feed.wanted for _, feed in feeds]
    try:
        states = engine.forward_batch([(np.array(feed.tokens), each.held.cache) for each, feed in feeds])
        ends = accumulate(len(feed.tokens) for _, feed in feeds)
        rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
        logits = engine.logits(states[rows]) if rows else np.empty((0, 0), np.float32)
    except CancelledError:
        for each, _ in feeds:
            each.held.cut(len(each.held.tokens))
        return []
    ends = accumulate(wanted)
    return [logits[end - count : end] for end, count in zip(ends, wanted, strict=True)]
