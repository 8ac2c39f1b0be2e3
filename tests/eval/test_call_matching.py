"""The leaderboard's rules, case by case, each as its documentation and data have it."""

from __future__ import annotations

from typing import Any

import pytest

from mobilellm.eval.call_matching import fault_of_calls
from mobilellm.tool_calls import ToolCall

FUNCTION: dict[str, Any] = {
    "name": "math.area",
    "parameters": {
        "type": "dict",
        "properties": {
            "width": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "exact": {"type": "boolean"},
            "points": {"type": "array", "items": {"type": "float"}},
            "names": {"type": "array", "items": {"type": "string"}},
            "at": {"type": "tuple", "items": {"type": "integer"}},
            "options": {"type": "dict"},
            "rows": {"type": "array", "items": {"type": "dict"}},
            "any": {"type": "any"},
        },
        "required": ["width"],
    },
}


def fault(arguments: dict[str, Any], allowed: dict[str, list[Any]], name: str = "math.area") -> str:
    answers = [{"math.area": {"width": [3], **allowed}}]
    return fault_of_calls([FUNCTION], [ToolCall(name, {"width": 3, **arguments})], answers)


@pytest.mark.parametrize(
    ("allowed", "value"),
    [
        ({"height": [2.0]}, 2),  # an integer will do for a float
        ({"height": [2.0]}, 2.0),
        ({"unit": ["New York, NY"]}, "new york ny"),
        ({"unit": ["it's"]}, 'It"s'),
        ({"unit": ["", "m"]}, "m"),
        ({"unit": ["", "m"]}, ""),
        ({"exact": [True]}, True),
        ({"points": [[1.0, 2.5]]}, [1.0, 2.5]),
        ({"points": [[1, 2]]}, [1, 2]),  # integers where the answer has them
        ({"names": [["Ann", "Bo"]]}, ["ann", "b.o"]),
        ({"names": ["", ["Ann"]]}, []),  # "" stands for an empty list too
        ({"at": [[1, 2]]}, [1, 2]),
        ({"options": [{"a": [1, 2], "b": ["", "x"]}]}, {"a": 2}),
        ({"options": [{"a": [1, 2], "b": ["", "x"]}]}, {"a": 1, "b": "X"}),
        ({"options": ["", {"a": [1]}]}, {"a": 1}),
        ({"rows": [[{"a": [1]}, {"b": ["x", ""]}]]}, [{"a": 1}, {}]),
        ({"any": ["x"]}, "X"),
        ({"any": [5]}, 5),
        ({"exact": ["is_exact"]}, "is_exact"),  # a variable's name, where that is the answer
    ],
)
def test_right_values(allowed: dict[str, list[Any]], value: object) -> None:
    (name,) = allowed
    assert fault({name: value}, allowed) == ""


@pytest.mark.parametrize(
    ("allowed", "value", "wrong"),
    [
        ({"width": [3]}, 4, "wrong value"),
        ({"width": [3]}, 3.0, "wrong type"),
        ({"width": [3]}, "3", "wrong type"),
        ({"width": [1]}, True, "wrong type"),
        ({"height": [2.0]}, "2", "wrong type"),
        ({"height": [2.0]}, 10**400, "wrong type"),
        ({"unit": ["metres"]}, "meters", "wrong value"),
        ({"exact": [True]}, False, "wrong value"),
        ({"exact": ["is_exact"]}, "Is_exact", "wrong value"),
        ({"points": [[1.0, 2.5]]}, [2.5, 1.0], "wrong value"),
        ({"points": [[1.0, 2.5]]}, ["1", "2.5"], "wrong type"),
        ({"points": [[1.0]]}, 1.0, "wrong type"),
        ({"names": [["Ann"]]}, [["Ann"]], "wrong type"),
        ({"names": [["Ann"]]}, "Ann", "wrong type"),
        ({"options": [{"a": [1]}]}, {"a": 2}, "wrong value"),
        ({"options": [{"a": [1]}]}, {"a": 1, "b": 1}, "wrong value"),
        ({"options": [{"a": [1], "b": [2]}]}, {"a": 1}, "wrong value"),
        ({"options": [{"a": [["X"]]}]}, {"a": ["x"]}, "wrong value"),  # inside, lists have to be equal
        ({"options": ["", {"a": [1]}]}, {}, "wrong value"),
        ({"rows": [[{"a": [1]}]]}, [{"a": 1}, {"a": 1}], "wrong value"),
        ({"rows": [[{"a": [1]}, {"b": [1]}]]}, [{"b": 1}, {"a": 1}], "wrong value"),
        ({"rows": ["", [{"a": [1]}]]}, ["a"], "wrong value"),
        ({"any": ["x"]}, 5, "wrong type"),
        ({"unit": [""]}, "m", "wrong value"),
        ({"unit": [""]}, 5, "wrong type"),
    ],
)
def test_wrong_values(allowed: dict[str, list[Any]], value: object, wrong: str) -> None:
    (name,) = allowed
    assert fault({name: value}, allowed) == wrong


def test_parameters() -> None:
    optional = {"unit": ["m", ""], "exact": ["", True]}
    assert fault({}, optional) == ""
    assert fault({}, {"unit": ["m"]}) == "missing parameter"
    assert fault({"unit": "m", "colour": "red"}, optional) == "unexpected parameter"
    assert fault({"height": 1.0}, optional) == "unexpected parameter"  # described, but in no answer
    without = [ToolCall("math.area", {"unit": "m"})]
    assert fault_of_calls([FUNCTION], without, [{"math.area": {"width": ["", 3]}}]) == "missing parameter"


def test_names() -> None:
    assert fault({}, {}, "math_area") == ""
    assert fault({}, {}, "area") == "wrong function"
    plain = {"name": "math_area", "parameters": FUNCTION["parameters"]}
    call = [ToolCall("math.area", {"width": 3})]
    assert fault_of_calls([plain], call, [{"math_area": {"width": [3]}}]) == "wrong function"


def test_counts_and_no_calls() -> None:
    call, answer = ToolCall("math.area", {"width": 3}), {"math.area": {"width": [3]}}
    assert fault_of_calls([FUNCTION], [], [answer]) == "no call"
    assert fault_of_calls([FUNCTION], [call, call], [answer]) == "wrong number of calls"
    assert fault_of_calls([FUNCTION], [call], []) == "call where none fits"
    assert fault_of_calls([FUNCTION], [], []) == ""


def test_several_in_any_order() -> None:
    other = {"name": "turn", "parameters": {"properties": {"by": {"type": "integer"}}, "required": ["by"]}}
    answers = [{"turn": {"by": [1]}}, {"math.area": {"width": [3]}}, {"turn": {"by": [2, 3]}}]
    calls = [ToolCall("turn", {"by": 3}), ToolCall("turn", {"by": 1}), ToolCall("math_area", {"width": 3})]
    assert fault_of_calls([FUNCTION, other], calls, answers) == ""
    assert fault_of_calls([FUNCTION, other], [calls[0], calls[0], calls[2]], answers) == "wrong value"
    # Gone through in turn: the first answer takes the only call that fits the second.
    greedy = [{"turn": {"by": [1, 2]}}, {"turn": {"by": [1]}}]
    assert fault_of_calls([other], [ToolCall("turn", {"by": 1}), ToolCall("turn", {"by": 2})], greedy) != ""
