"""How well a model answers as the conversations of a file do, and whether it ends.

loss        nats a token of what the assistant says, the end of its turns included, given all before it
perplexity  its exponential. Both compare models with one tokenizer and chat template only
bits a byte the same loss by the UTF-8 bytes of what the assistant says, which compares any two models
stop rate   share of greedy answers that the model ends by itself within the limit
length      tokens of these answers, beside those of the references
repetition  mean share of an answer's 4-grams of tokens that it has said before: 1 - distinct / all, which
            Welleck et al. (2020) call seq-rep-4; of answers with fewer tokens 0
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mobilellm.completion import Completion
from mobilellm.data.conversation_shapes import Talk
from mobilellm.eval.asking import answers, asking
from mobilellm.eval.conversations import Conversations
from mobilellm.eval.interface import ChatFormat, LanguageModel, Request
from mobilellm.eval.intervals import clustered, wilson
from mobilellm.eval.record import Record, record

PROTOCOL = "chat"
_GRAM = 4


class Answered(NamedTuple):
    """The first answer of a conversation: what came before it, the reference's, the model's."""

    messages: list[dict[str, Any]]
    reference: str
    completion: Completion | None
    """None where the prompt fills the model's context."""


class ChatEvaluation(NamedTuple):
    record: Record
    answered: list[Answered]


def evaluate_chat(
    model: LanguageModel,
    conversations: Conversations,
    answered: int = 100,
    max_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
    counts: Callable[[], tuple[int, int]] | None = None,
) -> ChatEvaluation:
    """The loss on every conversation, and greedy answers to the first message of the first `answered`.

    `progress` is told how many conversations are scored or answered, and of how many; `counts` gives how many
    requests were computed and how many came from a cache. Conversations longer than the model's context are
    left out of the loss, and counted. Raises ValueError where that leaves none, and for what the chat
    template refuses.
    """
    if answered < 1:
        raise ValueError(f"answered = {answered} must be at least 1")
    chat, template, notes = asking(model)
    asked = conversations.talks[:answered]
    total = len(conversations.talks) + len(asked)

    def report(done: int) -> None:
        if progress:
            progress(done, total)

    begin = time.perf_counter()
    losses, items = _losses(model, chat, conversations, report)
    firsts = [_first(talk) for talk in asked]
    prompts = [
        chat.prompt(talk.messages[:place], talk.tools) for talk, place in zip(asked, firsts, strict=True)
    ]
    scored_ones = len(conversations.talks)
    given = answers(model, prompts, max_tokens, lambda done, _: report(scored_ones + done))
    found, ended = _of_answers(model, asked, firsts, given.completions)
    results = {
        conversations.name: {"protocol": PROTOCOL, **losses, **found, "text_sha256": conversations.sha256}
    }
    scored, cached = counts() if counts else (total, 0)
    notes += [f"{count:,} records skipped: {reason}" for reason, count in conversations.skipped.items()]
    protocol = {
        "name": PROTOCOL, "max_tokens": max_tokens, "answered": answered, "chat_template_sha256": template,
        "notes": notes,
    }  # fmt: skip
    made = record(
        "chat", model.identity, protocol, results, {conversations.name: {**items, **ended}},
        time.perf_counter() - begin, scored, cached,
    )  # fmt: skip
    said = [_text(talk.messages[place]) for talk, place in zip(asked, firsts, strict=True)]
    before = [talk.messages[:place] for talk, place in zip(asked, firsts, strict=True)]
    return ChatEvaluation(made, list(map(Answered, before, said, given.completions)))


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of `tokens` that came before among them; 0 of fewer than 4 tokens."""
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _losses(
    model: LanguageModel, chat: ChatFormat, conversations: Conversations, report: Callable[[int], None]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    requests, masks, sizes, words = list[Request](), [], [], []
    for talk in conversations.talks:
        tokens, trained = chat.conversation(talk.messages, talk.tools)
        if len(tokens) - 1 > model.context or not any(trained[1:]):
            continue
        requests.append(Request(tuple(tokens[:1]), tuple(tokens[1:])))
        masks.append(np.array(trained[1:]))
        said = [_text(message) for message in talk.messages if message["role"] == "assistant"]
        sizes.append(sum(len(text.encode()) for text in said))
        words.append(sum(len(text.split()) for text in said))
    if not requests:
        raise ValueError(
            f"{conversations.name}: none of its {len(conversations.talks):,} conversations fits the model's "
            f"context of {model.context:,} tokens"
        )
    nats = [0.0] * len(requests)
    for done, (number, answer) in enumerate(model.log_likelihoods(requests), 1):
        nats[number] = -float(answer.tokens[masks[number]].sum(dtype=np.float64))
        report(done)
    tokens_of = [int(mask.sum()) for mask in masks]
    means = [one / count for one, count in zip(nats, tokens_of, strict=True)]
    interval = clustered(means, range(len(means)), tokens_of)
    total = math.fsum(nats)
    found = {
        "conversations": len(requests),
        "over_context": len(conversations.talks) - len(requests),
        "tokens": sum(tokens_of), "bytes": sum(sizes),
        "loss": total / sum(tokens_of),
        "perplexity": math.exp(total / sum(tokens_of)),
        "bits_per_byte": total / math.log(2) / sum(sizes) if sum(sizes) else None,
    }  # fmt: skip
    if interval is not None:
        found |= {"loss_low": interval[0], "loss_high": interval[1]}
    items = {"nats": nats}
    items |= {
        name: list(map(float, each))
        for name, each in (("tokens", tokens_of), ("bytes", sizes), ("words", words))
    }
    return found, items


def _of_answers(
    model: LanguageModel,
    talks: Sequence[Talk],
    firsts: Sequence[int],
    completions: Sequence[Completion | None],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    given = [completion for completion in completions if completion is not None]
    references = [_text(talk.messages[place]) for talk, place in zip(talks, firsts, strict=True)]
    lengths = [len(ids) for ids in model.encode(references, special=False)]
    found: dict[str, Any] = {
        "answered": len(given), "answers_over_context": completions.count(None),
        "reference_length": sum(lengths) / len(lengths),
    }  # fmt: skip
    if not given:
        return found, {}
    ended = [float(completion.finish == "eos") for completion in given]
    words = [completion.tokens[: -1 if completion.finish == "eos" else None] for completion in given]
    low, high = wilson(int(sum(ended)), len(ended))
    repeated = [repetition(ids) for ids in words]
    found |= {
        "stop_rate": sum(ended) / len(ended), "stop_rate_low": low, "stop_rate_high": high,
        "length": sum(map(len, words)) / len(words),
        "repetition": sum(repeated) / len(repeated),
        "empty": sum(not completion.text.strip() for completion in given),
    }  # fmt: skip
    return found, {"stopped": ended, "repetition": repeated}


def _first(talk: Talk) -> int:
    return next(place for place, message in enumerate(talk.messages) if message["role"] == "assistant")


def _text(message: dict[str, Any]) -> str:
    """What an assistant's message says, calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*filter(None, [message["content"]]), *calls])
