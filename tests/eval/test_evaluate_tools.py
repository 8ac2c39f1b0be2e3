"""The whole of `eval tools` over a model that says what it is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from leaderboard_files import SIMPLE, SIMPLE_ANSWERS, write, write_all
from scripted_model import ScriptedModel

from mobilellm.chat_template import DEFAULT
from mobilellm.eval.compare import Difference, compare
from mobilellm.eval.intervals import wilson
from mobilellm.eval.record import Record, read, save
from mobilellm.eval.tools import OVER_CONTEXT, evaluate_tools, read_tool_data

TOOL = {"name": "search", "parameters": {"type": "object", "properties": {"for": {"type": "string"}}}}
CALL = {"name": "search", "arguments": {"for": "rice"}}
TALK = {
    "conversations": [
        {"from": "human", "value": "Find rice."},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "[]"},
        {"from": "gpt", "value": "There is none."},
    ],
    "tools": json.dumps([TOOL]),
}
CHAT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "tools": "[]"}


def says(prompt: str) -> str | tuple[str, Any]:
    answers = {
        "Add 0.": '<tool_call>\n{"name": "math.add", "arguments": {"a": 0}}\n</tool_call>',
        "Add 1.": "math_add(a=1, b=2.0)",
        "Add 2.": ("I will not stop " * 3, "length"),
        "Add 1 and 2.": '[{"name": "math.add", "arguments": {"a": 2}}, {"name": "math.add", "arguments": {"a": 1}}]',
        "How is the weather?": "I cannot tell.",
        "Hi": "turn(by={})",
    }
    asked = prompt.partition("user: ")[2].partition("\x04")[0]
    if asked == "Find rice.":
        return "There is none at all." if "tool: []" in prompt else json.dumps(CALL)
    return answers[asked]


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([CHAT, TALK, TALK]), encoding="utf-8")
    return file


def test_everything_at_once(tmp_path: Path, conversations: Path) -> None:
    model = ScriptedModel(says)
    told: list[tuple[int, int]] = []
    data = read_tool_data([write_all(tmp_path / "bfcl"), conversations])
    made, log = evaluate_tools(model, data, 48, lambda done, total: told.append((done, total)))
    results = made.results
    assert list(results) == ["simple", "parallel", "irrelevance", "live_irrelevance", "talks.json"]
    simple = results["simple"]
    assert (simple["accuracy"], simple["questions"], simple["without_call"]) == (1 / 3, 3, 1)
    assert (simple["accuracy_low"], simple["accuracy_high"]) == wilson(1, 3)
    assert simple["faults"] == {"wrong value": 1, "no call": 1}
    assert (simple["truncated"], simple["over_context"]) == (1, 0)
    assert [results[name]["accuracy"] for name in ("parallel", "irrelevance", "live_irrelevance")] == [
        1,
        1,
        0,
    ]
    talks = results["talks.json"]
    assert {key: talks[key] for key in ("conversations", "call_turns", "text_turns")} == {
        "conversations": 2, "call_turns": 2, "text_turns": 2
    }  # fmt: skip
    assert (talks["intent"], talks["structure"], talks["call"]) == (1, 1, 1)
    assert (talks["call_low"], talks["call_high"]) == wilson(2, 2)  # two conversations prove little
    assert talks["rouge1"] == talks["rougeL"] == pytest.approx(2 * 3 / (3 + 5))
    assert (talks["without_call"], talks["needless_calls"]) == (0, 0)
    assert made.items["simple"] == {"accuracy": [1.0, 0.0, 0.0]}
    assert made.items["talks.json"]["rouge1"] == [talks["rouge1"]] * 2
    assert told[-1] == (10, 10) == (len(log), made.scored)
    assert log[1] == {
        "task": "simple", "prompt_tokens": log[1]["prompt_tokens"], "id": "simple_python_1",
        "answer": "math_add(a=1, b=2.0)", "finish": "eos",
        "calls": [{"name": "math_add", "arguments": {"a": 1, "b": 2.0}}], "fault": "wrong value",
    }  # fmt: skip
    assert log[-1]["wanted_text"] == "There is none."
    assert log[-2]["wanted_calls"] == [CALL]
    assert model.templates == ["plain"]
    assert '"number"' in model.asked[0]  # the tools, as JSON schemas
    save(made, tmp_path / "record.json")
    assert read(tmp_path / "record.json").results == json.loads(json.dumps(results))


def test_the_same_again(tmp_path: Path) -> None:
    data = read_tool_data([write_all(tmp_path)])
    (one, log), (other, again) = (evaluate_tools(ScriptedModel(says), data) for _ in range(2))
    assert (one.results, one.items, log) == (other.results, other.items, again)


def test_a_base_model_is_asked_by_our_own_template(tmp_path: Path) -> None:
    model = ScriptedModel(says, template=None)
    made, _ = evaluate_tools(model, read_tool_data([write_all(tmp_path)]))
    assert model.templates == [DEFAULT]
    assert "a model without a chat template" in made.protocol["notes"][0]


def test_what_does_not_fit_is_wrong_and_counted(tmp_path: Path) -> None:
    model = ScriptedModel(says, context=60)  # holds no prompt with a tool in it
    made, log = evaluate_tools(model, read_tool_data([write_all(tmp_path)]))
    assert made.results["simple"]["over_context"] == 3
    assert made.results["simple"]["faults"] == {OVER_CONTEXT: 3}
    assert made.results["irrelevance"]["accuracy"] == 0  # an answer never given is no right one
    assert made.results["irrelevance"]["without_call"] == 0
    assert log[0]["answer"] is None
    assert log[0]["finish"] == OVER_CONTEXT
    assert len(model.asked) == 1  # the question without functions


def test_a_limit(tmp_path: Path, conversations: Path) -> None:
    data = read_tool_data([write_all(tmp_path / "bfcl"), conversations], limit=2)
    assert {name: len(held) for name, held in data.questions.items()} == {
        "simple": 2, "parallel": 1, "irrelevance": 1, "live_irrelevance": 1
    }  # fmt: skip
    assert len(data.conversations[0].talks) == 2


def test_refused(tmp_path: Path, conversations: Path) -> None:
    folder = write_all(tmp_path / "bfcl")
    simple = folder / "BFCL_v4_simple_python.json"
    plain = write(tmp_path / "plain.jsonl", [CHAT])
    for paths, limit, complaint in (
        ([tmp_path / "nothing"], None, "nothing: no such file or folder"),
        ([simple], 0, "limit = 0 must be at least 1"),
        ([simple, simple], None, "data: question simple_python_0 comes twice"),
        ([conversations, conversations], None, r"data: file talks\.json comes twice"),
        ([plain], None, "no conversation in it has tools \\(1 without\\); mobilellm eval chat"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            read_tool_data(paths, limit=limit)
    write(folder / "BFCL_v4_simple_python.possible_answer.json", SIMPLE_ANSWERS[1:])
    with pytest.raises(ValueError, match="has no answer to 'simple_python_0'"):
        read_tool_data([folder])
    with pytest.raises(ValueError, match="max_tokens = 0 must be at least 1"):
        evaluate_tools(ScriptedModel(says), read_tool_data([conversations]), 0)
    assert SIMPLE  # its answers are what is missing


def test_two_records_compared(tmp_path: Path, conversations: Path) -> None:
    data = read_tool_data([write_all(tmp_path / "bfcl"), conversations])

    def better(prompt: str) -> str | tuple[str, Any]:
        if "Find rice." in prompt:
            return "There is none." if "tool: []" in prompt else "It is 12."
        return "math.add(a=2)" if "Add 2." in prompt else says(prompt)

    one, other = (evaluate_tools(ScriptedModel(each), data)[0] for each in (says, better))
    first = replace(one, results={k: v for k, v in one.results.items() if v.get("questions", 2) > 1})
    first = replace(first, items={name: one.items[name] for name in first.results})
    rows = {row.name: row for row in compare(first, other).rows}
    assert set(rows) == {
        "simple", *(f"talks.json: {metric}" for metric in ("intent", "structure", "call", "rouge1", "rougeL"))
    }  # fmt: skip
    simple, rouge, call = rows["simple"], rows["talks.json: rouge1"], rows["talks.json: call"]
    assert isinstance(simple, Difference)
    assert isinstance(rouge, Difference)
    assert isinstance(call, Difference)
    assert (simple.won, simple.lost, simple.p, simple.documents) == (1, 0, 1.0, 3)
    assert (rouge.b, rouge.difference, rouge.won) == (1.0, 1 - rouge.a, 2)
    assert (call.difference, call.low, call.high, call.lost) == (-1.0, -1.0, -1.0, 2)
    with pytest.raises(ValueError, match="simple: not comparable: other documents"):
        compare(evaluate_tools(ScriptedModel(says), read_tool_data([tmp_path / "bfcl"], limit=2))[0], other)


def test_turns_of_one_conversation_are_drawn_together(tmp_path: Path, conversations: Path) -> None:
    made = evaluate_tools(ScriptedModel(says), read_tool_data([conversations]))[0]
    change = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]

    def record(values: list[float], groups: list[float]) -> Record:
        return replace(made, items={"talks.json": {"call": values, "call_conversation": groups}})

    widths = []
    for groups in ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]):
        (row,) = compare(record([0.0] * 6, groups), record(change, groups)).rows
        assert row.difference == 0.5
        widths.append(row.high - row.low)
    assert widths[0] < widths[1] == 1.0
