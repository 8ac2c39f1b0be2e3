"""A conversation and its answers, without a terminal.

With a chat template the messages are rendered for every answer. A base model has none: what is typed and what
is answered are then one text that goes on.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

from mobilellm.chat.settings import Settings
from mobilellm.chat.speakers import Speaker
from mobilellm.chat_template import ChatTemplate
from mobilellm.completion import FinishReason, NewToken, RowText
from mobilellm.runtime.decoding import window

Message = dict[str, Any]
"""As in the OpenAI interface: role, content."""


class Talk:
    """Messages, the last of which an answer is asked to."""

    def __init__(self, speaker: Speaker, settings: Settings | None = None) -> None:
        """Raises ValueError for a chat template that cannot be read."""
        self.speaker = speaker
        self.settings = settings or Settings()
        self.messages: list[Message] = []
        self.answered: Answer | None = None
        """The last answer, whole or not."""
        source = speaker.chat_template
        self._template = None if source is None else ChatTemplate(source, speaker.tokenizer)
        self._first = 0
        """Of the messages after the system's, the first that is still told the model."""

    @property
    def is_chat(self) -> bool:
        """False for a base model, which continues the text."""
        return self._template is not None

    @property
    def system(self) -> str | None:
        if self.messages and self.messages[0]["role"] == "system":
            return str(self.messages[0]["content"])
        return None

    def set_system(self, text: str | None) -> None:
        """The message in front of all others; None takes it away. Raises ValueError for a base model."""
        if text is not None and not self.is_chat:
            raise ValueError(
                f"system = {text!r} does not go with {self.speaker.source}, a base model: it has no chat "
                "template and is told nothing apart from the text it continues; leave it out"
            )
        rest = self._turns()
        self.messages = rest if text is None else [{"role": "system", "content": text}, *rest]
        self._first = 0

    def replace(self, messages: Sequence[Message]) -> None:
        """Another conversation. Raises ValueError for one that the model cannot be told."""
        if not self.is_chat and any(message["role"] not in ("user", "assistant") for message in messages):
            raise ValueError(
                f"{self.speaker.source} has no chat template and continues one text; a conversation with "
                "other roles than user and assistant cannot be told it"
            )
        self.messages, self._first, self.answered = list(messages), 0, None

    def reset(self) -> None:
        """Forget all but the system message."""
        self.replace([message for message in self.messages[:1] if message["role"] == "system"])

    def take_back(self) -> str | None:
        """Forget the last message of the user and what came after it; the text of it, None without one."""
        places = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            return None
        text = str(self.messages[places[-1]]["content"])
        self.replace(self.messages[: places[-1]])
        return text

    def ask(self, text: str) -> Answer:
        """Say `text` and have it answered. Raises ValueError for what does not fit; it is then not said."""
        self.messages.append({"role": "user", "content": text})
        try:
            self.answered = Answer(self)
        except ValueError:
            self.messages.pop()
            raise
        return self.answered

    def prompt(self) -> tuple[list[int], int]:
        """Token ids that the next answer follows, and how many messages are left out (base model: tokens).

        At least a quarter of the context, or `max_tokens`, is to be left for an answer. Where it is not, the
        oldest messages are left out until half the context is free, so that it does not happen every time.
        Raises ValueError where that is not wanted or not enough.
        """
        context, most = self.speaker.context, self.settings.max_tokens
        room = context - min(most or max(1, context // 4), context // 2)
        if self._template is None:
            text = "".join(str(message["content"]) for message in self.messages)
            tokens = self.speaker.tokenizer.encode(text)
            if len(tokens) > room and self.settings.context == "slide":
                kept = window(tokens, room)
                return kept, len(tokens) - len(kept)
            self._check(len(tokens))
            return tokens, 0
        system = [self.messages[0]] if self.system is not None else []
        turns = self._turns()
        tokens = self._template.prompt([*system, *turns[self._first :]])
        if len(tokens) > room and self.settings.context == "slide":
            later = [n for n, turn in enumerate(turns) if turn["role"] == "user" and n > self._first]
            for self._first in later:
                tokens = self._template.prompt([*system, *turns[self._first :]])
                if len(tokens) <= context // 2:
                    break
        self._check(len(tokens))
        return tokens, self._first

    def _turns(self) -> list[Message]:
        return self.messages[1:] if self.system is not None else self.messages

    def _check(self, tokens: int) -> None:
        context = self.speaker.context
        if tokens >= context:
            mend = (
                "shorten it" if self.settings.context == "slide" else "begin anew, or let the context slide"
            )
            raise ValueError(f"{tokens:,} tokens do not fit the model's context of {context:,}; {mend}")


class Answer:
    """Text as it is said. However the iteration ends, what has been said is a message of the conversation.

    Where that is nothing, because it was stopped before, the message to be answered is taken back.
    """

    def __init__(self, talk: Talk) -> None:
        """Raises ValueError for a conversation that does not fit, or settings that do not fit the model."""
        self.text = ""
        self.finish: FinishReason = "cancelled"
        """Until it ends otherwise."""
        self.tokens = 0
        self._talk, settings = talk, talk.settings
        prompt, self.left_out = talk.prompt()
        self.prompt_tokens = len(prompt)
        text = RowText(talk.speaker.tokenizer, settings.stop, first=len(prompt) == 1)
        self._row_text = text
        self._new = talk.speaker.tokens(
            prompt, settings.sampling, settings.max_tokens, lambda _, token: text.push(token)
        )
        self.first_token_seconds: float | None = None
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None where there was no second."""
        if self.first_token_seconds is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(1e-9, self.seconds - self.first_token_seconds)

    @property
    def reused(self) -> int:
        """Tokens of the prompt that had been computed before."""
        return self._talk.speaker.reused

    def __iter__(self) -> Generator[str]:
        started = time.perf_counter()
        try:
            for new in self._new:
                self.seconds = time.perf_counter() - started
                if self.first_token_seconds is None:
                    self.first_token_seconds = self.seconds
                if text := self._shown(new):
                    yield text
        finally:
            if self.text or self.finish != "cancelled":
                self._talk.messages.append({"role": "assistant", "content": self._message()})
            else:
                self._talk.messages.pop()

    def _shown(self, new: NewToken) -> str:
        """What of a token is shown. White space in front of an answer is not."""
        self.tokens += new.token is not None
        if new.finish:
            self.finish = new.finish
        text = self._row_text.piece(new).text
        if self._talk.is_chat and not self.text:
            text = text.lstrip()
        self.text += text
        return text

    def _message(self) -> str:
        return self.text.rstrip() if self._talk.is_chat else self.text
