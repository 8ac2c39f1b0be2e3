"""Text in, text out, the same for every way to run a model: completions, and how tokens become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from mobilellm.text_stream import TextStream
from mobilellm.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "context"]


class NewToken(NamedTuple):
    row: int
    token: int
    finish: FinishReason | None  # set on the row's last token


class Completion(NamedTuple):
    """What was generated for one prompt; the prompt itself is not repeated.

    `finish` is "eos", "stop" (a stop string, not part of the text), "length" (max_new_tokens) or "context"
    (the model's context is full).
    """

    text: str
    tokens: list[int]
    finish: FinishReason


class Piece(NamedTuple):
    """One new token of one prompt and the text that can be shown after it (often several, or none)."""

    row: int
    token: int
    text: str
    finish: FinishReason | None  # set on the row's last piece


Until = Callable[[int, int], bool]
"""(row, token just drawn) -> whether the row ends here."""


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
    streams = [TextStream(tokenizer, stop, first=not prompt) for prompt in prompts]
    shown = ""

    def until(row: int, token: int) -> bool:
        nonlocal shown
        shown = streams[row].push(token)
        return streams[row].stopped

    def pieces(tokens: Iterator[NewToken]) -> Iterator[Piece]:
        nonlocal shown
        for row, token, finish in tokens:
            text, shown = shown, ""
            yield Piece(row, token, text + streams[row].finish() if finish else text, finish)

    return pieces(generate(tokenizer.encode_batch(prompts), until))


def completions(pieces: Iterable[Piece], count: int) -> list[Completion]:
    """The pieces of `count` prompts put together."""
    texts, tokens = [""] * count, [list[int]() for _ in range(count)]
    reasons: list[FinishReason] = ["length"] * count
    for piece in pieces:
        texts[piece.row] += piece.text
        tokens[piece.row].append(piece.token)
        reasons[piece.row] = piece.finish or reasons[piece.row]
    return [Completion(*row) for row in zip(texts, tokens, reasons, strict=True)]


def continue_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[str],
    generate: Callable[[Sequence[Sequence[int]], Until], Iterator[NewToken]],
) -> list[str]:
    """What `generate` adds to each prompt of token ids, up to a stop string."""
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    texts = [""] * len(prompts)

    def until(row: int, token: int) -> bool:
        texts[row] += streams[row].push(token)
        return streams[row].stopped

    for new in generate(prompts, until):
        if new.finish:
            texts[new.row] += streams[new.row].finish()
    return texts
