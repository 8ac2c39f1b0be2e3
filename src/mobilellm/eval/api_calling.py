"""API calling in conversations, by the figures of the MobileLLM paper's table 6.

Every turn of the assistant in a held-out conversation with tools is answered after the conversation's own
earlier turns. Where the reference calls, the calls are compared; where it speaks, the text is, by ROUGE. The
paper names exact match of intent and of structure, and ROUGE-1 and ROUGE-L of the agent's responses, and
defines none of them; here

intent      the same functions are called, as often, in any order
structure   and each with the same names of arguments
call        and each with the same values, as JSON values (1 equals 1.0)
rouge1, rougeL   F-measure of the text, words as rouge_score cuts them, without stemming
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mobilellm.tool_calls import ToolCall, parse_tool_calls

if TYPE_CHECKING:
    from mobilellm.data.conversation_shapes import Talk

OF_CALLS, OF_TEXTS = ("intent", "structure", "call"), ("rouge1", "rougeL")


@dataclass(frozen=True)
class Turn:
    """One answer of the assistant's that is asked for again."""

    conversation: int
    messages: Sequence[dict[str, Any]]
    """What comes before it."""
    tools: Sequence[dict[str, Any]]
    text: str
    calls: tuple[ToolCall, ...]
    """Of the reference; where there are any, its text does not count."""


class Score(NamedTuple):
    """Of one turn: its metrics, 0 … 1, and the calls in the answer."""

    values: dict[str, float]
    calls: list[ToolCall]


def turns_of(talks: Iterable[Talk]) -> list[Turn]:
    """The assistant's turns of conversations that have tools; others are no test of calling."""
    return [
        Turn(number, talk.messages[:place], talk.tools, message["content"] or "", tuple(_calls(message)))
        for number, talk in enumerate(talks)
        if talk.tools
        for place, message in enumerate(talk.messages)
        if message["role"] == "assistant"
    ]


def score(turn: Turn, answer: str | None) -> Score:
    """`answer` is what the model wrote, None where it could not be asked, which counts as empty."""
    text, calls = parse_tool_calls(answer or "")
    if turn.calls:
        return Score(_compared(calls, turn.calls), calls)
    return Score(_rouge(text, turn.text), calls)


def _calls(message: dict[str, Any]) -> list[ToolCall]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [ToolCall(function["name"], function["arguments"]) for function in functions]


def _compared(calls: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> dict[str, float]:
    one, other = ([_forms(call) for call in each] for each in (calls, wanted))
    return {
        metric: float(sorted(form[place] for form in one) == sorted(form[place] for form in other))
        for place, metric in enumerate(OF_CALLS)
    }


def _forms(call: ToolCall) -> tuple[str, str, str]:
    """As text: the name; with the names of arguments; with their values."""
    return (
        call.name,
        json.dumps([call.name, sorted(call.arguments)]),
        json.dumps([call.name, _even(call.arguments)], sort_keys=True),
    )


def _even(value: Any) -> Any:
    """JSON has one kind of number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _even(each) for key, each in value.items()}
    return [_even(each) for each in value] if isinstance(value, list) else value


def _rouge(text: str, wanted: str) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(list(OF_TEXTS), use_stemmer=False).score(wanted, text)
    return {metric: float(scores[metric].fmeasure) for metric in OF_TEXTS}
