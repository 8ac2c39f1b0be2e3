"""What is asked of an artefact in its own runtime, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm.chat_template import Message

Floats = NDArray[np.float32]


class Runtime(Protocol):
    """An open artefact. Every call begins with an empty cache."""

    name: str
    """The program that runs it, with its version."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids by the artefact's own tokenizer, BOS in front."""

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        """Ids of a conversation up to where the assistant speaks, as who uses this runtime gets them from the
        artefact's own chat template; None where it has none."""

    def logits(self, tokens: Sequence[int]) -> Floats:
        """(T, V) after every one of the tokens, fed at once where the runtime can."""

    def steps(self, tokens: Sequence[int]) -> Floats:
        """The same, fed one by one through the runtime's cache, as generation does."""

    def greedy(self, prompt: Sequence[int], most: int, forced: tuple[int, int] | None = None) -> list[int]:
        """The new tokens of greedy decoding by the runtime's own loop, which ends after a stop token.

        `forced` = (n, token): at the n-th new token (from 0) that token's logit is above all others, as if
        the model had wanted it.
        """


@dataclass(frozen=True)
class ChatQuestion:
    messages: Sequence[Message]
    ids: list[int]
    """What the source's template makes of them."""
    most: int
    """New tokens of the answer."""


@dataclass(frozen=True)
class Questions:
    texts: list[str]
    """Encoded, to compare the tokenizer."""
    windows: list[list[int]]
    """Token ids that follow each other in real text, BOS in front; logits after each."""
    steps: list[int]
    """The beginning of a window, fed one token at a time."""
    prompt: list[int]
    most: int
    """New tokens after the prompt."""
    stop: tuple[int, int]
    """(n, id): generation must end when the model wants the stop token as n-th new token."""
    chat: ChatQuestion | None = None
    """Of a model that has a chat template."""


@dataclass(frozen=True)
class Answers:
    runtime: str
    ids: list[list[int]]
    logits: list[Floats]
    steps: Floats
    greedy: list[int]
    stopped: list[int]
    chat: list[int] | None = None
    """The ids of the conversation."""
    said: list[int] = field(default_factory=list)
    """The answer to it."""


def ask(runtime: Runtime, questions: Questions) -> Answers:
    asked = questions.chat
    chat = runtime.chat(asked.messages) if asked else None
    return Answers(
        runtime.name,
        runtime.encode(questions.texts),
        [runtime.logits(window) for window in questions.windows],
        runtime.steps(questions.steps),
        runtime.greedy(questions.prompt, questions.most),
        runtime.greedy(questions.prompt, questions.stop[0] + 4, questions.stop),
        chat,
        runtime.greedy(chat, asked.most) if asked and chat else [],
    )
