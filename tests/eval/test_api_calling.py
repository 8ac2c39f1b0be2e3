"""API calling, turn by turn, with figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mobilellm.data.conversation_shapes import Talk
from mobilellm.eval.api_calling import Turn, score, turns_of
from mobilellm.tool_calls import ToolCall

TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TALK = Talk(
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "", "tool_calls": [call("f", a=1)]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "It is one."},
    ],
    [TOOL],
)


def test_turns() -> None:
    first, second = turns_of([Talk(TALK.messages, []), TALK])
    assert first == Turn(1, TALK.messages[:1], [TOOL], "", (ToolCall("f", {"a": 1}),))
    assert second == Turn(1, TALK.messages[:3], [TOOL], "It is one.", ())


@pytest.mark.parametrize(
    ("answer", "intent", "structure", "whole"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1.0, "b": [2, {"c": 3}]}}</tool_call>', 1, 1, 1),
        ('{"name": "f", "arguments": {"b": [2, {"c": 3}], "a": 1}}', 1, 1, 1),
        ('f(a=1, b=[2, {"c": 4}])', 1, 1, 0),
        ('f(a="1", b=2)', 1, 1, 0),
        ("f(a=1)", 1, 0, 0),
        ("g(a=1, b=2)", 0, 0, 0),
        ("f(a=1, b=[2, {'c': 3}]), f(a=1, b=[2, {'c': 3}])", 0, 0, 0),
        ("I would call f.", 0, 0, 0),
        (None, 0, 0, 0),
    ],
)
def test_calls(answer: str | None, intent: int, structure: int, whole: int) -> None:
    turn = Turn(0, [], [], "", (ToolCall("f", {"a": 1, "b": [2, {"c": 3}]}),))
    assert score(turn, answer).values == {"intent": intent, "structure": structure, "call": whole}


def test_several_calls_in_any_order() -> None:
    turn = Turn(0, [], [], "", (ToolCall("f", {"a": 1}), ToolCall("g", {})))
    assert score(turn, "g(), f(a=1)").values == {"intent": 1, "structure": 1, "call": 1}
    assert score(turn, "g(), f(a=2)").values == {"intent": 1, "structure": 1, "call": 0}


def test_texts() -> None:
    turn = Turn(0, [], [], "the cat sat on the mat", ())
    # Of 6 words and 4, 3 are the same, and 2 in one order: F = 2 * 3 / 10 and 2 * 2 / 10.
    assert score(turn, "mat the dog sat").values == pytest.approx({"rouge1": 0.6, "rougeL": 0.4})
    assert score(turn, "The cat sat on the mat.").values == {"rouge1": 1.0, "rougeL": 1.0}
    assert score(turn, None).values == {"rouge1": 0.0, "rougeL": 0.0}
    called = score(turn, "f(a=1)")
    assert called.values == {"rouge1": 0.0, "rougeL": 0.0}
    assert called.calls == [ToolCall("f", {"a": 1})]
