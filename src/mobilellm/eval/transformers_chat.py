"""Conversations as tokens by a tokenizer of transformers, with the model's own chat template or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mobilellm.chat_template import Conversation, Message, Tool, checked


class TokenizerChat:
    """A `ChatFormat`. The tokenizer renders and encodes the whole, as transformers does it everywhere."""

    def __init__(self, tokenizer: Any, template: str, name: str) -> None:
        self._tokenizer, self._template, self._name = tokenizer, template, name

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Ids up to where the assistant speaks. Raises ValueError, one line, for what cannot be rendered."""
        return self._tokens(messages, tools, asking=True)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Conversation:
        """Trained is what is added to the prompt of each of the assistant's turns.

        Raises ValueError where the tokens of a beginning are no beginning of the tokens, and as `prompt`.
        """
        tokens = self._tokens(messages, tools, asking=False)
        trained = [False] * len(tokens)
        for index in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
            before = self._tokens(messages[:index], tools, asking=True)
            after = self._tokens(messages[: index + 1], tools, asking=False)
            if after[: len(before)] != before or tokens[: len(after)] != after:
                raise ValueError(
                    f"{self._name}: its chat template or tokenizer treats messages 1 to {index + 1} "
                    "otherwise where others follow, so what the assistant says cannot be told apart"
                )
            trained[len(before) : len(after)] = [True] * (len(after) - len(before))
        return Conversation(tokens, trained)

    def _tokens(self, messages: Sequence[Message], tools: Sequence[Tool] | None, asking: bool) -> list[int]:
        sound = list(map(checked, messages))
        try:
            text = self._tokenizer.apply_chat_template(
                sound, tools=list(tools or []) or None, chat_template=self._template, tokenize=False,
                add_generation_prompt=asking,
            )  # fmt: skip
        except Exception as error:  # a template is a program of someone else's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self._name}: chat template: {reason}") from None
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
