"""Calling tools, measured: the leaderboard's questions by its rules, and API calling in conversations."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mobilellm.completion import Completion
from mobilellm.eval.api_calling import OF_CALLS, OF_TEXTS, Turn, score, turns_of
from mobilellm.eval.asking import Answers, answers, asking
from mobilellm.eval.bfcl import Question, holds_questions, question_files, read_questions
from mobilellm.eval.call_matching import fault_of_calls
from mobilellm.eval.conversations import Conversations, read_conversations
from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.intervals import clustered, wilson
from mobilellm.eval.record import Record, record
from mobilellm.tool_calls import ToolCall, parse_tool_calls

PROTOCOL = "tool calling, greedy"
OVER_CONTEXT = "over context"
NOTES = {
    "bfcl": "simple, multiple, parallel, irrelevance: right by the rules of the Berkeley Function-Calling "
    "Leaderboard's AST checker; irrelevance alone says nothing, as a model that never calls has 100 %",
    "api": "API calling: each turn after the conversation's own earlier ones; intent, structure and call are "
    "exact matches of the functions, of their arguments' names too, of their values too",
}


@dataclass(frozen=True)
class ToolData:
    questions: dict[str, list[Question]] = field(default_factory=dict)
    """By category."""
    conversations: list[Conversations] = field(default_factory=list)


class ToolsEvaluation(NamedTuple):
    record: Record
    answers: list[dict[str, Any]]
    """What was asked, written and found, one object an answer; JSON."""


def read_tool_data(
    paths: Sequence[Path], held_out: float | None = None, limit: int | None = None
) -> ToolData:
    """Questions of the leaderboard (files, or a folder with several) and files of conversations with tools.

    The first `limit` of each category and file; `held_out` is as in `read_conversations`. Raises
    FileNotFoundError or ValueError with one line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit} must be at least 1")
    data = ToolData()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of questions")
        for file in question_files(path) if path.is_dir() else [path]:
            if not holds_questions(file):
                data.conversations.append(_with_tools(file, held_out, limit))
                continue
            for question in read_questions(file):
                held = data.questions.setdefault(question.category, [])
                if limit is None or len(held) < limit:
                    held.append(question)
    _refuse_repeated(data)
    if held_out is not None and not data.conversations:
        raise ValueError(
            f"held_out = {held_out} is of files of conversations, and none is named; leave it out: the "
            "leaderboard's questions are no training data"
        )
    return data


def evaluate_tools(
    model: LanguageModel,
    data: ToolData,
    max_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
    counts: Callable[[], tuple[int, int]] | None = None,
) -> ToolsEvaluation:
    """Ask everything, in the model's chat format with the tools, and judge the answers.

    `progress` is told how many answers there are, and of how many; `counts` gives how many were computed and
    how many came from a cache. A question longer than the model's context counts as wrong, and is counted.
    Raises ValueError for what the chat template refuses.
    """
    chat, template, notes = asking(model)
    groups: list[tuple[str, list[Question] | list[Turn]]] = [*data.questions.items()]
    groups += [(each.name, turns_of(each.talks)) for each in data.conversations]
    prompts = [[chat.prompt(each.messages, each.tools) for each in group] for _, group in groups]
    total, done, begin = sum(map(len, prompts)), 0, time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    items: dict[str, dict[str, list[float]]] = {}
    log: list[dict[str, Any]] = []
    for (name, group), asked in zip(groups, prompts, strict=True):

        def report(here: int, _: int, before: int = done) -> None:
            if progress:
                progress(before + here, total)

        given = answers(model, asked, max_tokens, report)
        done += len(asked)
        results[name], items[name], lines = _judged(group, given)
        results[name]["documents_sha256"] = _sha256(group)
        log += [
            {"task": name, "prompt_tokens": len(ids), **line} for ids, line in zip(asked, lines, strict=True)
        ]
    scored, cached = counts() if counts else (done, 0)
    notes += [NOTES["bfcl"]] if data.questions else []
    notes += [NOTES["api"]] if data.conversations else []
    for each in data.conversations:
        notes += [
            f"{each.name}: {count:,} records skipped: {reason}" for reason, count in each.skipped.items()
        ]
    protocol = {
        "name": PROTOCOL,
        "max_tokens": max_tokens,
        "chat_template_sha256": template,
        "rouge_score": version("rouge_score"),
        "notes": notes,
    }
    made = record(
        "tools", model.identity, protocol, results, items, time.perf_counter() - begin, scored, cached
    )
    return ToolsEvaluation(made, log)


def _judged(
    group: list[Question] | list[Turn], given: Answers
) -> tuple[dict[str, Any], dict[str, list[float]], list[dict[str, Any]]]:
    """Results, items by metric, and a line of the log for each."""
    counted = {"truncated": given.truncated, "over_context": given.over_context}
    pairs = list(zip(group, given.completions, strict=True))
    questions = [(each, completion) for each, completion in pairs if isinstance(each, Question)]
    if questions:
        found, values, lines = _questions_judged(questions)
    else:
        found, values, lines = _turns_judged([(each, one) for each, one in pairs if isinstance(each, Turn)])
    return {**found, **counted}, values, lines


def _questions_judged(
    asked: Sequence[tuple[Question, Completion | None]],
) -> tuple[dict[str, Any], dict[str, list[float]], list[dict[str, Any]]]:
    faults, lines, without = [], [], 0
    for question, completion in asked:
        calls = parse_tool_calls(completion.text)[1] if completion else []
        fault = fault_of_calls(question.functions, calls, question.answers) if completion else OVER_CONTEXT
        without += completion is not None and not calls
        faults.append(fault)
        lines.append({"id": question.id, **_written(completion, calls), "fault": fault})
    right = faults.count("")
    low, high = wilson(right, len(faults))
    found = {
        "questions": len(faults), "accuracy": right / len(faults), "accuracy_low": low, "accuracy_high": high,
        "without_call": without, "faults": dict(Counter(fault for fault in faults if fault).most_common()),
    }  # fmt: skip
    return found, {"accuracy": [float(fault == "") for fault in faults]}, lines


def _turns_judged(
    asked: Sequence[tuple[Turn, Completion | None]],
) -> tuple[dict[str, Any], dict[str, list[float]], list[dict[str, Any]]]:
    values: dict[str, list[float]] = {metric: [] for metric in (*OF_CALLS, *OF_TEXTS)}
    places: dict[str, list[int]] = {metric: [] for metric in values}
    lines, without, needless = [], 0, 0
    for turn, completion in asked:
        scores, calls = score(turn, completion.text if completion else None)
        without += bool(completion and turn.calls and not calls)
        needless += bool(calls and not turn.calls)
        for metric, value in scores.items():
            values[metric].append(value)
            places[metric].append(turn.conversation)
        wanted = {"wanted_calls": _objects(turn.calls)} if turn.calls else {"wanted_text": turn.text}
        lines.append({"conversation": turn.conversation, **_written(completion, calls), **wanted, **scores})
    found: dict[str, Any] = {
        "conversations": len({turn.conversation for turn, _ in asked}),
        "call_turns": len(values["call"]), "text_turns": len(values["rougeL"]),
        "without_call": without, "needless_calls": needless,
    }  # fmt: skip
    for metric, each in values.items():
        if each:
            found[metric] = sum(each) / len(each)
            if (interval := _of_turns(metric, each, places[metric])) is not None:
                found |= {f"{metric}_low": interval[0], f"{metric}_high": interval[1]}
    items = {metric: each for metric, each in values.items() if each}
    # Turns of one conversation are not independent: whoever compares must know which belong together.
    items |= {f"{metric}_conversation": list(map(float, places[metric])) for metric in items}
    return found, items, lines


def _of_turns(metric: str, values: Sequence[float], places: Sequence[int]) -> tuple[float, float] | None:
    """The interval of a mean over turns; None where one conversation is all there is to tell it from."""
    interval = clustered(values, places)
    if metric in OF_TEXTS or (interval is not None and interval[0] < interval[1]):
        return interval
    groups = len(set(places))  # none right or all: resampling finds nothing else
    return wilson(round(groups * sum(values) / len(values)), groups)


def _written(completion: Completion | None, calls: Sequence[ToolCall]) -> dict[str, Any]:
    return {
        "answer": None if completion is None else completion.text,
        "finish": OVER_CONTEXT if completion is None else completion.finish,
        "calls": _objects(calls),
    }


def _objects(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [call._asdict() for call in calls]


def _with_tools(file: Path, held_out: float | None, limit: int | None) -> Conversations:
    found = read_conversations(file, held_out, limit)
    if not turns_of(found.talks):
        raise ValueError(
            f"{file}: no conversation in it has tools ({len(found.talks):,} without); "
            "mobilellm eval chat measures those without"
        )
    return found


def _refuse_repeated(data: ToolData) -> None:
    names = [each.name for each in data.conversations]
    ids = [question.id for held in data.questions.values() for question in held]
    for what, each in (("file", names), ("question", ids)):
        if repeated := [name for name, count in Counter(each).items() if count > 1]:
            raise ValueError(f"data: {what} {repeated[0]} comes twice; name it once")


def _sha256(group: list[Question] | list[Turn]) -> str:
    return hashlib.sha256(json.dumps([vars(each) for each in group]).encode()).hexdigest()
