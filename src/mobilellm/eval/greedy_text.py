"""Greedy decoding with the `generate` of a transformers model, and nothing that its settings would add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mobilellm.completion import Completion, FinishReason, room_for

_PROMPTS_AT_ONCE = 16


class GreedyDecoder:
    """Takes the model's generation settings away: a repetition penalty among them is no greedy decoding."""

    def __init__(self, model: Any, tokenizer: Any, context: int, vocabulary: int) -> None:
        self._model, self._tokenizer, self._context = model, tokenizer, context
        stated = getattr(model.generation_config, "eos_token_id", None)
        stated = stated if isinstance(stated, list) else [stated]
        ends = dict.fromkeys([*stated, tokenizer.eos_token_id])
        self._ends = [end for end in ends if end is not None and 0 <= end < vocabulary]
        self._settings = {
            "do_sample": False,
            "eos_token_id": self._ends or None,
            "pad_token_id": self._ends[0] if self._ends else 0,
        }
        model.generation_config = GenerationConfig(**self._settings)

    def completions(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        """What is added to each prompt before a stop string, an EOS, `max_tokens`, or a full context.

        Prompts of one length are decoded together, so that nothing is padded.
        """
        if max_tokens < 1 or not all(stop):
            raise ValueError(
                f"greedy: max_tokens = {max_tokens} must be at least 1, and no stop string empty"
            )
        found = dict[int, Completion]()
        for numbers in _equally_long(prompts):
            prompt = torch.tensor([list(prompts[number]) for number in numbers], device=self._model.device)
            length = prompt.shape[1]
            out = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=GenerationConfig(
                    **self._settings, max_new_tokens=min(max_tokens, self._context - length + 1)
                ),
                stopping_criteria=StoppingCriteriaList([_Stopped(self, length, stop)]),
            )
            for number, row in zip(numbers, out.tolist(), strict=True):
                limit = room_for(length, max_tokens, self._context + 1)  # the last token drawn is never fed
                found[number] = self._completion(row[:length], row[length:], stop, limit)
        return [found[number] for number in range(len(prompts))]

    def _completion(
        self, prompt: list[int], tokens: list[int], stop: Sequence[str], limit: tuple[int, FinishReason]
    ) -> Completion:
        """Of a row that may go on after its end: rows of a batch end together."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._ends), None)
        text = self.added(prompt, tokens)
        short = _before_any(stop, text)
        if short != text:
            kept = next(
                n for n in range(1, len(tokens) + 1) if _has_any(stop, self.added(prompt, tokens[:n]))
            )
            return Completion(short, tokens[:kept], "stop")
        return Completion(text, tokens[:end], "eos" if end else limit[1])

    def added(self, prompt: list[int], tokens: list[int]) -> str:
        """The text of `tokens` up to an EOS, read after the prompt: some tokenizers drop a first space."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        before, whole = self._decode(prompt), self._decode(prompt + tokens[:end])
        return whole[len(before) :] if whole.startswith(before) else self._decode(tokens[:end])

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, decoder: GreedyDecoder, length: int, stop: Sequence[str]) -> None:
        self._decoder, self._length, self._stop = decoder, length, stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        texts = [self._decoder.added(row[: self._length], row[self._length :]) for row in input_ids.tolist()]
        stopped = [_has_any(self._stop, each) for each in texts]
        return torch.tensor(stopped, device=input_ids.device)


def _equally_long(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of prompts of one length, a few at a time, the longest first."""

    def length(number: int) -> int:
        return -len(prompts[number])

    for _, group in groupby(sorted(range(len(prompts)), key=length), key=length):
        numbers = list(group)
        for start in range(0, len(numbers), _PROMPTS_AT_ONCE):
            yield numbers[start : start + _PROMPTS_AT_ONCE]


def _has_any(stop: Sequence[str], text: str) -> bool:
    return any(each in text for each in stop)


def _before_any(stop: Sequence[str], text: str) -> str:
    """The text before whichever stop string comes first."""
    return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]
