"""What an evaluation asks of a model, whatever runs it: a checkpoint in PyTorch, transformers, a runtime.

Perplexity and the zero-shot tasks know models only through `LanguageModel`, so that every artefact is scored
by the same code and lands in the same table. Log-likelihoods are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm.chat_template import Conversation, Message, Tool
from mobilellm.completion import Completion


class Request(NamedTuple):
    """How likely is the continuation after the context?

    Both hold at least one token id; context and continuation without its last token fit the model's context.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The answer to a Request."""

    tokens: NDArray[np.float32]
    """Log-likelihood of every token of the continuation, (len(continuation),)."""
    greedy: bool
    """Whether greedy decoding would have given the continuation."""

    @property
    def total(self) -> float:
        """Log-likelihood of the continuation, summed in float64."""
        return float(self.tokens.sum(dtype=np.float64))


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was scored, and in which arithmetic; goes into every record."""

    name: str
    """What the user typed."""
    backend: str
    """What ran it: "mobilellm", "transformers", ..."""
    dtype: str
    device: str
    fingerprint: str
    """SHA-256 over weights, configuration and tokenizer: equal for equal models wherever they lie."""
    parameters: int
    """Stored weights, a shared one counted once."""
    bytes: int
    """Of the stored weights."""
    config: dict[str, Any]

    @property
    def weights_dtype(self) -> str:
        """`dtype` without what it may say of the arithmetic, "bfloat16 (computed in float32)"."""
        return self.dtype.partition(" ")[0]


class ChatFormat(Protocol):
    """Conversations as a model's tokens: `mobilellm.chat_template.ChatTemplate`, or what stands for one.

    Raises ValueError, one line, for messages that are none and for what the template refuses.
    """

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Ids up to where the assistant speaks."""
        ...

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Conversation:
        """Ids of all of it, and which of them the assistant says."""
        ...


class LanguageModel(Protocol):
    """A model and its tokenizer."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def context(self) -> int:
        """Most tokens the model takes at once."""
        ...

    @property
    def bos(self) -> int:
        """The id that stands before a text where there is nothing else to stand on: BOS, else EOS."""
        ...

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text; `special` lets the tokenizer add what it adds by itself (a BOS, for most)."""
        ...

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text without special tokens, and for each the character where it begins."""
        ...

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """(number of the request, its answer) in whatever order is quickest, each as soon as it is known.

        Answers do not depend on what else is asked (in bfloat16: beyond rounding).
        """
        ...

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        """What greedy decoding adds to each prompt, up to a stop string (not included) or the end."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Of a model to talk to. None of a base model."""
        ...

    def chat_format(self, template: str) -> ChatFormat:
        """Conversations by a template, the model's own or another. Raises ValueError for what is none."""
        ...
