"""The leaderboard's own checker gives the same verdicts: over its data, on right answers and on spoilt ones.

Skipped without the package: `pip install --no-deps bfcl_eval` will do, as only its checker and data are used.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mobilellm.eval.call_matching import fault_of_calls
from mobilellm.tool_calls import ToolCall

if find_spec("bfcl_eval") is None:
    pytest.skip("needs the leaderboard's package: pip install --no-deps bfcl_eval", allow_module_level=True)

CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
SPOILT_OF_EACH = 12

Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def bfcl() -> Iterator[ModuleType]:
    """The checker, without the clients of every vendor that its table of models would import."""
    table = ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {"dots": SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    kept = sys.modules.get(table.__name__)
    sys.modules[table.__name__] = table
    try:
        from bfcl_eval.eval_checker.ast_eval import ast_checker

        yield ast_checker
    finally:
        del sys.modules[table.__name__]
        if kept is not None:
            sys.modules[table.__name__] = kept


def rows(category: str) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(functions, answers) of every question."""
    spec = find_spec("bfcl_eval")
    assert spec
    assert spec.origin
    data = Path(spec.origin).parent / "data"
    questions, answers = (
        {row["id"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        for file in (data / f"BFCL_v4_{category}.json", data / "possible_answer" / f"BFCL_v4_{category}.json")
    )
    return [(row["function"], answers[name]["ground_truth"]) for name, row in questions.items()]


def official(bfcl: ModuleType, category: str, functions: Any, calls: Calls, answers: Any) -> bool:
    from bfcl_eval.constants.enums import Language

    try:
        verdict = bfcl.ast_checker(
            functions, [{name: arguments} for name, arguments in calls], answers, Language.PYTHON, category, "dots"
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError):  # on values of a type it does not think of
        return False
    return bool(verdict["valid"])


def value_of(allowed: Any, chance: random.Random) -> Any:
    """One of the allowed values. Dictionaries, also those in lists, have allowed values for every field."""
    value = chance.choice(allowed)
    if isinstance(value, list):
        return [fields_of(each, chance) if isinstance(each, dict) else each for each in value]
    return fields_of(value, chance) if isinstance(value, dict) else value


def fields_of(value: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return {
        key: chance.choice([field for field in fields if field != ""])
        for key, fields in value.items()
        if any(field != "" for field in fields) and ("" not in fields or chance.random() < 0.5)
    }


def right(answers: Any, chance: random.Random) -> Calls:
    calls = []
    for answer in answers:
        ((name, allowed),) = answer.items()
        arguments = {
            key: value_of([value for value in values if value != ""], chance)
            for key, values in allowed.items()
            if any(value != "" for value in values) and ("" not in values or chance.random() < 0.5)
        }
        calls.append((name, arguments))
    return calls


def other(value: Any, chance: random.Random) -> Any:
    """Something near a value: another spelling of it, another type, another value."""
    ways: list[Any] = [str(value), [value], {"value": value}, None, True, 0, 1.0, "", [], {}]
    if isinstance(value, str):
        ways += [
            value.upper(),
            value.replace(" ", "-"),
            f"{value}.",
            value[::-1],
            list(value),
            value + " x",
            "'",
        ]
    elif isinstance(value, bool):
        ways += [not value, int(value)]
    elif isinstance(value, int | float):
        ways += [float(value), int(value), value + 1, -value, value / 3, 10**30]
    elif isinstance(value, list):
        ways += [value[::-1], value[:-1], [*value, *value[:1]], [other(each, chance) for each in value]]
        ways += [list(map(str, value)), [each.title() if isinstance(each, str) else each for each in value]]
    elif isinstance(value, dict) and value:
        key = chance.choice(list(value))
        ways += [
            {**value, key: other(value[key], chance)},
            {name: each for name, each in value.items() if name != key},
            {**value, "more": 1},
        ]
    return chance.choice(ways)


def spoilt(calls: Calls, functions: Any, chance: random.Random) -> Calls:
    """One or two changes; some leave the answer right."""
    calls = [(name, dict(arguments)) for name, arguments in calls]
    for _ in range(chance.choice([1, 1, 2])):
        if not calls:
            break
        number = chance.randrange(len(calls))
        _, arguments = calls[number]
        match chance.randrange(10):
            case 0:
                chance.shuffle(calls)
            case 1:
                calls.pop(number)
            case 2:
                calls.append(chance.choice(calls))
            case 3:
                calls[number] = (
                    chance.choice([function["name"] for function in functions] + ["x"]),
                    arguments,
                )
            case 4 if arguments:
                del arguments[chance.choice(list(arguments))]
            case 5:
                arguments[chance.choice([*functions[0]["parameters"]["properties"], "x"])] = 1
            case _ if arguments:
                key = chance.choice(list(arguments))
                arguments[key] = other(arguments[key], chance)
    return calls


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_same_verdict(bfcl: ModuleType, category: str) -> None:
    chance = random.Random(category)
    verdicts = Counter[bool]()
    for functions, answers in rows(category):
        asked = right(answers, chance)
        for calls in [asked, *(spoilt(asked, functions, chance) for _ in range(SPOILT_OF_EACH))]:
            verdict = official(bfcl, category, functions, calls, answers)
            verdicts[verdict] += 1
            fault = fault_of_calls(functions, [ToolCall(*call) for call in calls], answers)
            assert (fault == "") == verdict, (fault, calls, answers)
    print(category, dict(verdicts))
    assert min(verdicts[True], verdicts[False]) > len(rows(category))
