"""Asking a model to answer conversations: by its chat template, greedily, all that fit its context."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mobilellm.chat_template import DEFAULT
from mobilellm.completion import Completion
from mobilellm.eval.interface import ChatFormat, LanguageModel

_AT_ONCE = 32
"""Answers between two reports of progress; a model batches as many of them as suit it."""

BASE_MODEL_NOTE = (
    "a model without a chat template: it was asked by this package's own, the one fine-tuning would give it"
)


class Asking(NamedTuple):
    """How a model is spoken to, and what a record has to say of it."""

    chat: ChatFormat
    template_sha256: str
    notes: list[str]


class Answers(NamedTuple):
    """None where the prompt leaves no room for an answer in the model's context."""

    completions: list[Completion | None]

    @property
    def over_context(self) -> int:
        return self.completions.count(None)

    @property
    def truncated(self) -> int:
        """How many did not end by themselves."""
        return sum(1 for each in self.completions if each is not None and each.finish != "eos")


def asking(model: LanguageModel) -> Asking:
    """By the model's own chat template; a base model is asked as it would be once fine-tuned, so that the
    prompt before is the one after. Raises ValueError for a template that is none.
    """
    template = model.chat_template or DEFAULT
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    return Asking(model.chat_format(template), digest, [] if model.chat_template else [BASE_MODEL_NOTE])


def answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Greedy answers, each up to the end of the turn, `max_tokens`, or a full context.

    `progress` is told how many are answered, and of how many. Raises ValueError for max_tokens below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens} must be at least 1")
    found = dict[int, Completion]()
    fitting = [number for number, prompt in enumerate(prompts) if len(prompt) < model.context]
    fitting.sort(key=lambda number: len(prompts[number]))
    for start in range(0, len(fitting), _AT_ONCE):
        part = fitting[start : start + _AT_ONCE]
        found.update(zip(part, model.greedy([prompts[n] for n in part], (), max_tokens), strict=True))
        if progress:
            progress(len(found), len(fitting))
    return Answers([found.get(number) for number in range(len(prompts))])
