"""The shapes of published instruction and function-calling data, each to the same messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mobilellm.data.conversation_shapes import (
    NO_ANSWER,
    NOT_A_MESSAGE,
    NOT_A_TOOL,
    UNKNOWN_ROLE,
    UNKNOWN_SHAPE,
    NoTalkError,
    talk_of,
)

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Count."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": '{"sum": 4}'}
TOOL = {"name": "add", "parameters": {"type": "object"}}
IN_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n2 + 2?\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n"
    "### Response:"
)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"messages": [{"role": "developer", "content": "Count."}, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "2 + 2?", "completion": "4"}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "2 + 2?", "response": "4"}, [USER, ANSWER]),
        ({"prompt": IN_ALPACA, "response": "4"}, [USER, ANSWER]),
        ({"prompt": WITH_INPUT, "response": "4"}, [{"role": "user", "content": "Add.\n\n2 and 2"}, ANSWER]),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, [USER, ANSWER]),
        (
            {"instruction": "Add.", "input": "2 and 2", "output": "4"},
            [{"role": "user", "content": "Add.\n\n2 and 2"}, ANSWER],
        ),
        (
            {"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "open_qa"},
            [{"role": "user", "content": "Add.\n\n2 and 2"}, ANSWER],
        ),
        (
            {"instruction": "2 + 2?", "output": "4", "history": [["Hi", "Hello"]], "system": "Count."},
            [
                SYSTEM,
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                USER,
                ANSWER,
            ],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
                "system": "Count.",
            },
            [SYSTEM, USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    {"from": "observation", "value": '{"sum": 4}'},
                    {"from": "gpt", "value": "4"},
                ],
                "tools": json.dumps([TOOL]),
            },
            [USER, CALL, RESULT, ANSWER],
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                    {"role": "function", "content": {"sum": 4}},
                    ANSWER,
                ],
                "functions": [TOOL],
            },
            [USER, CALL, RESULT, ANSWER],
        ),
        (
            {
                "conversations": [
                    USER,
                    {"from": "gpt", "value": "I add."},
                    {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 2}}]'},
                ],
                "tools": [TOOL],
            },
            [USER, {**CALL, "content": "I add."}],
        ),
        ({"question": "2 + 2?", "answer": "4"}, [USER, ANSWER]),
    ],
)
def test_shapes(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    talk = talk_of(record)
    assert talk.messages == messages
    assert talk.tools == ([TOOL] if {"tools", "functions"} & record.keys() else [])


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({"text": "plain"}, UNKNOWN_SHAPE, "its keys are text"),
        ({}, UNKNOWN_SHAPE, "its keys are none"),
        ({"messages": [{"role": "robot", "content": "x"}]}, UNKNOWN_ROLE, "role robot"),
        ({"conversations": [{"from": None, "value": "x"}]}, UNKNOWN_ROLE, "role null"),
        ({"messages": "hello"}, NOT_A_MESSAGE, "messages = hello is no list"),
        ({"messages": ["hello"]}, NOT_A_MESSAGE, "hello is no object"),
        (
            {"messages": [USER, {"role": "assistant", "content": 4}]},
            NOT_A_MESSAGE,
            "content = 4 must be text",
        ),
        ({"prompt": 3, "completion": "4"}, NOT_A_MESSAGE, "user says 3"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, NOT_A_MESSAGE, "must be pairs of texts"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, NOT_A_MESSAGE, "not JSON: add"),
        ({"messages": [USER]}, NO_ANSWER, "2 . 2"),
        ({"messages": []}, NO_ANSWER, "^.]$"),
        ({"prompt": "2 + 2?"}, NO_ANSWER, "2 . 2"),
        ({"question": [[USER]], "function": [TOOL]}, NO_ANSWER, "2 . 2"),
        ({"messages": [USER, ANSWER], "tools": "add"}, NOT_A_TOOL, "not JSON"),
        ({"messages": [USER, ANSWER], "tools": [{"parameters": {}}]}, NOT_A_TOOL, "no function with a name"),
    ],
)
def test_what_is_no_conversation(record: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(NoTalkError, match=words) as raised:
        talk_of(record)
    assert raised.value.reason == reason
    assert "\n" not in str(raised.value)
