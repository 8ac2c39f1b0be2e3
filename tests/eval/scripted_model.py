"""A model that says what a test tells it to: characters are tokens, conversations are plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mobilellm.chat_template import Conversation
from mobilellm.completion import Completion, FinishReason
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request

IDENTITY = ModelIdentity("scripted", "test", "float32", "cpu", "0" * 64, 1, 4, {})
END = 0x04

Says = Callable[[str], str | tuple[str, FinishReason]]


class PlainChat:
    """[tools]\\n role: content END for every message."""

    def prompt(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> list[int]:
        listed = f"{json.dumps(list(tools))}\n" if tools else ""
        return [1, *map(ord, listed + "".join(map(self._turn, messages)) + "assistant: ")]

    def conversation(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> Conversation:
        tokens = self.prompt([], tools)[: -len("assistant: ")]
        trained = [False] * len(tokens)
        for message in messages:
            turn = list(map(ord, self._turn(message)))
            head = len(message["role"]) + 2
            mine = message["role"] == "assistant"
            tokens += turn
            trained += [False] * head + [mine] * (len(turn) - head)
        return Conversation(tokens, trained)

    def _turn(self, message: Any) -> str:
        calls = "".join(
            f"<tool_call>{json.dumps(call['function'])}</tool_call>"
            for call in message.get("tool_calls") or ()
        )
        return f"{message['role']}: {message['content'] or ''}{calls}{chr(END)}"


class ScriptedModel:
    """Every token has likelihood 1/e; `says` gives the answer to a prompt and how it ended ("eos")."""

    bos = 1

    def __init__(self, says: Says, context: int = 10_000, template: str | None = "plain") -> None:
        self.context, self.chat_template, self.identity = context, template, IDENTITY
        self._says = says
        self.asked: list[str] = []
        self.templates: list[str] = []

    def chat_format(self, template: str) -> PlainChat:
        self.templates.append(template)
        return PlainChat()

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return [[1] * special + list(map(ord, text)) for text in texts]

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        for number in reversed(range(len(requests))):
            yield number, Likelihood(-np.ones(len(requests[number].continuation), np.float32), False)

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        found = []
        for prompt in prompts:
            assert len(prompt) < self.context
            text = "".join(map(chr, prompt[1:]))
            self.asked.append(text)
            said = self._says(text)
            answer, finish = (said, "eos") if isinstance(said, str) else said
            found.append(Completion(answer, [*map(ord, answer), *([END] if finish == "eos" else [])], finish))
        return found
