"""Models to talk to that need no weights: what is said is what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from mobilellm.chat_template import DEFAULT
from mobilellm.completion import NewToken, Until, check_prompts, room_for
from mobilellm.sampling import Sampling
from mobilellm.tokenizer import EOS_ID, Tokenizer


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to learn pieces from, and some more words of all kinds"] * 20, 300)


class Parrot:
    """A `Speaker` whose n-th answer is the n-th of `answers`, then EOS; keeps the prompts it was given."""

    source, runs_in, reused = "parrot", "Python", 0

    def __init__(
        self, tokenizer: Tokenizer, answers: Sequence[str], context: int = 200, template: str | None = DEFAULT
    ) -> None:
        self.tokenizer, self.context, self.chat_template = tokenizer, context, template
        self.prompts: list[list[int]] = []
        self.on_token: Callable[[int], None] = lambda number: None
        self._answers = iter(answers)

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int | None, until: Until
    ) -> Iterator[NewToken]:
        check_prompts([prompt], self.context, self.tokenizer.vocab_size, max_new_tokens)
        self.prompts.append(list(prompt))
        most, reason = room_for(len(prompt), max_new_tokens, self.context)
        return self._said(
            [*self.tokenizer.encode(next(self._answers), bos=False), EOS_ID], most, reason, until
        )

    def _said(self, ids: list[int], most: int, reason: str, until: Until) -> Iterator[NewToken]:
        for number, token in enumerate(ids[:most]):
            self.on_token(number)
            if token == EOS_ID:
                yield NewToken(0, token, "eos")
            elif until(0, token):
                yield NewToken(0, token, "stop")
                return
            else:
                yield NewToken(0, token, reason if number == most - 1 else None)  # type: ignore[arg-type]

    def told(self, number: int = -1) -> str:
        """A prompt as text, special tokens by name."""
        return self.tokenizer.decode(self.prompts[number], skip_special=False)
