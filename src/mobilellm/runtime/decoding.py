"""How a sequence is computed, where there is a choice: the end of the context, drafts from the prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mobilellm.completion import FinishReason, check_prompts, room_for
from mobilellm.config import ModelConfig

ContextPolicy = Literal["error", "stop", "slide"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """None of it changes what is drawn as long as all fits the context. ValueError names a bad field."""

    context: ContextPolicy = "error"
    """Where not all fits the model's context: refuse (error), end (stop), drop the older half (slide)."""
    prompt_lookup: int = 0
    """Guess so many tokens at a time from what followed the same words before. No token changes; 0 is off."""

    def __post_init__(self) -> None:
        if self.context not in get_args(ContextPolicy):
            raise ValueError(
                f"decoding: context = {self.context!r} is not known; choose error, stop or slide"
            )
        if not isinstance(self.prompt_lookup, int) or not 0 <= self.prompt_lookup <= 64:
            raise ValueError(f"decoding: prompt_lookup = {self.prompt_lookup} must be a whole number, 0 … 64")


class Limit(NamedTuple):
    """How many tokens a prompt gets at most, and what is said of it at the end."""

    tokens: int
    finish: FinishReason


def limits(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | None, config: ModelConfig, decoding: Decoding
) -> list[Limit]:
    """One Limit a prompt. Raises ValueError for a prompt that cannot be gone on from as `decoding` says."""
    context, slides = config.max_position_embeddings, decoding.context == "slide"
    check_prompts(prompts, sys.maxsize if slides else context, config.vocab_size, max_new_tokens)
    if slides:
        if max_new_tokens is None:
            raise ValueError("generate: context = 'slide' has no end of its own; say max_new_tokens")
        return [Limit(max_new_tokens, "length") for _ in prompts]
    for row, prompt in enumerate(prompts):
        room = context - len(prompt)
        if decoding.context == "error" and max_new_tokens is not None and max_new_tokens > room:
            raise ValueError(
                f"generate: prompt {row} has {len(prompt)} tokens, and {max_new_tokens} new ones do not fit "
                f"the model's context of {context}; ask for at most {room}, or choose context stop or slide"
            )
    return [Limit(*room_for(len(prompt), max_new_tokens, context)) for prompt in prompts]


def window_start(length: int, context: int) -> int:
    """How many tokens after the first are left out when a sequence of `length` tokens is computed.

    Whenever the context is full, half of it is dropped. What is left out follows from the length alone, so
    that a text is computed alike whether it was a prompt or came token by token.
    """
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half)) * half


def window(tokens: Sequence[int], context: int) -> list[int]:
    """What is computed of a sequence: the first token (BOS), and the latest part where not all fit."""
    start = window_start(len(tokens), context)
    return [*tokens[:1], *tokens[1 + start :]]
