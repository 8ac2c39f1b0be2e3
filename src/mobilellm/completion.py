"""Text in, text out, the same for every way to run a model: completions, and how tokens become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from mobilellm.text_stream import TextStream
from mobilellm.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


class NewToken(NamedTuple):
    row: int
    token: int | None  # None where the row was cancelled
    finish: FinishReason | None  # set on the row's last token


class Completion(NamedTuple):
    """What was generated for one prompt; the prompt itself is not repeated.

    `finish` is "eos", "stop" (a stop string, not part of the text), "length" (max_new_tokens), "context" (the
    model's context is full) or "cancelled" (another thread did, and this is what there was by then).
    """

    text: str
    tokens: list[int]
    finish: FinishReason


class Piece(NamedTuple):
    """One new token of one prompt and the text that can be shown after it (often several, or none)."""

    row: int
    token: int | None  # None where the row was cancelled
    text: str
    finish: FinishReason | None  # set on the row's last piece


Until = Callable[[int, int], bool]
"""(row, token just drawn) -> whether the row ends here."""


def check_prompts(
    prompts: Sequence[Sequence[int]], context: int, vocabulary: int, max_new_tokens: int | None
) -> None:
    """Raise ValueError for what cannot be gone on from: no room, no token, no such id."""
    if not prompts:
        raise ValueError("generate: no prompt given")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens = {max_new_tokens} must be at least 1")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {row} has no tokens; it needs at least one (BOS)")
        if len(prompt) >= context:
            raise ValueError(
                f"generate: prompt {row} has {len(prompt)} tokens and the model's context is {context}; "
                f"shorten it to at most {context - 1}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"generate: prompt {row} has token ids outside the vocabulary of {vocabulary} "
                f"({min(prompt)} … {max(prompt)}); the tokenizer does not fit this model"
            )


def room_for(prompt: int, max_new_tokens: int | None, context: int) -> tuple[int, FinishReason]:
    """New tokens after a prompt of `prompt` tokens, and what ends them."""
    room = context - prompt
    if max_new_tokens is not None and max_new_tokens <= room:
        return max_new_tokens, "length"
    return room, "context"


def stream_text(
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    stop: Sequence[str],
    generate: Callable[[list[list[int]], Until], Iterator[NewToken]],
) -> Iterator[Piece]:
    """Encode prompts, let `generate` draw tokens, yield every token's text, never half a character.

    What `generate` refuses at once is refused here at once.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [RowText(tokenizer, stop, first=not prompt) for prompt in prompts]

    def until(row: int, token: int) -> bool:
        return rows[row].push(token)

    def pieces(tokens: Iterator[NewToken]) -> Iterator[Piece]:
        for new in tokens:
            yield rows[new.row].piece(new)

    return pieces(generate(tokenizer.encode_batch(prompts), until))


class RowText:
    """One row's tokens as pieces of text.

    Each token but EOS is pushed when it is drawn; several may be before the first is made a piece.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), first: bool = False) -> None:
        self._stream = TextStream(tokenizer, stop, first)
        self._texts: deque[str] = deque()

    def push(self, token: int) -> bool:
        """Whether a stop string is there now."""
        self._texts.append(self._stream.push(token))
        return self._stream.stopped

    def piece(self, new: NewToken) -> Piece:
        text = "" if new.finish in ("eos", "cancelled") else self._texts.popleft()
        return Piece(new.row, new.token, text + self._stream.finish() if new.finish else text, new.finish)


def completions(pieces: Iterable[Piece], count: int) -> list[Completion]:
    """The pieces of `count` prompts put together."""
    texts, tokens = [""] * count, [list[int]() for _ in range(count)]
    reasons: list[FinishReason] = ["length"] * count
    for piece in pieces:
        texts[piece.row] += piece.text
        if piece.token is not None:
            tokens[piece.row].append(piece.token)
        reasons[piece.row] = piece.finish or reasons[piece.row]
    return [Completion(*row) for row in zip(texts, tokens, reasons, strict=True)]


def continue_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    generate: Callable[[Sequence[Sequence[int]], Until], Iterator[NewToken]],
) -> list[Completion]:
    """What `generate` adds to each prompt of token ids, up to a stop string."""
    rows = [RowText(tokenizer, stop) for _ in prompts]

    def until(row: int, token: int) -> bool:
        return rows[row].push(token)

    return completions((rows[new.row].piece(new) for new in generate(prompts, until)), len(prompts))
