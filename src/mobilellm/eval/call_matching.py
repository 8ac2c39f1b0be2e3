"""Whether calls are the right ones, by the rules of the Berkeley Function-Calling Leaderboard's AST checker.

The rules are those of its package bfcl_eval (github.com/ShishirPatil/gorilla, version 4 of the data) for
Python functions; the code is our own, and `tests/eval/test_bfcl_parity.py` compares the verdicts of both.

An answer is a list of {function: {parameter: [allowed value, ...]}}, one for each call. An allowed value ""
says that the parameter may be left out. A value has to have the type of the function's description (an
integer will do for a float) or that of the allowed values, and to equal one of them: texts but for case,
quotes, blanks and any of ,./-_*^; lists in their order; dictionaries field by field, each with its allowed
values. Of several calls the order does not matter: the answers are gone through in turn, and each takes the
first call that fits it and is not yet taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mobilellm.tool_calls import ToolCall

Fault = Literal[
    "", "no call", "wrong number of calls", "wrong function", "missing parameter", "unexpected parameter",
    "wrong type", "wrong value", "call where none fits",
]  # fmt: skip
"""What is wrong; "" where nothing is. In a list of calls it is that of the answer that no call fits."""

TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_OF_ITEMS = ("array", "tuple")
_INSIGNIFICANT = re.compile(r"[ ,./\-_*^]")


def fault_of_calls(
    functions: Sequence[Mapping[str, Any]],
    calls: Sequence[ToolCall],
    answers: Sequence[Mapping[str, Any]],
) -> Fault:
    """What is wrong with `calls` where `answers` were asked for; with no answers, no call is the right one.

    `functions` are the descriptions the model was shown; each answer names one of them.
    """
    if not calls or not answers:
        return "no call" if answers else "call where none fits" if calls else ""
    if len(calls) != len(answers):
        return "wrong number of calls"
    described = {function["name"]: function for function in functions}
    left = list(calls)
    for answer in answers:
        ((name, allowed),) = answer.items()
        faults = [_fault(described[name], call, allowed) for call in left]
        if "" not in faults:
            # Of one call its fault; of several the one that came closest tells more than any other.
            return max(faults, key=_CLOSENESS.index)  # "" is not among them
        del left[faults.index("")]
    return ""


_CLOSENESS: tuple[Fault, ...] = (
    "wrong function",
    "missing parameter",
    "unexpected parameter",
    "wrong type",
    "wrong value",
)


def is_name_of(written: str, name: str) -> bool:
    """Function names with dots may be written with underscores, which some chat formats ask for."""
    return written in (name, name.replace(".", "_"))


def _fault(function: Mapping[str, Any], call: ToolCall, allowed: Mapping[str, Any]) -> Fault:
    if not is_name_of(call.name, function["name"]):
        return "wrong function"
    properties = function["parameters"]["properties"]
    if any(name not in call.arguments for name in function["parameters"].get("required", ())):
        return "missing parameter"
    for name, value in call.arguments.items():
        if name not in properties or name not in allowed:
            return "unexpected parameter"
        if fault := _fault_of_value(value, properties[name], allowed[name]):
            return fault
    left_out = [values for name, values in allowed.items() if name not in call.arguments]
    return "" if all("" in values for values in left_out) else "missing parameter"


def _fault_of_value(value: Any, described: Mapping[str, Any], allowed: Sequence[Any]) -> Fault:
    wanted: Any = TYPES[described["type"]]
    of_items = TYPES[described["items"]["type"]] if described["type"] in _OF_ITEMS else None
    if wanted is float and type(value) is int:
        value = _as_float(value)
    told = _told_type(allowed)
    # A variable's name may be the answer where a number is described: then the answers tell the type.
    by_the_answers = told is not None and told is not wanted
    if type(value) is wanted:
        if of_items and not any(_items_fit(value, each, of_items) for each in allowed):
            return "wrong type"
    elif told is not None and type(value) is told:
        by_the_answers = True
    else:
        return "wrong type"
    if by_the_answers:
        right = value in allowed
    elif wanted is dict:
        right = _is_dict_allowed(value, allowed)
    elif wanted is list and of_items is dict:
        right = _is_list_of_dicts_allowed(value, allowed)
    elif wanted is list:  # "" stands for an empty list too
        right = _plain_row(value) in [_plain_row(each) for each in allowed if _is_row(each)]
    elif wanted is str:
        right = _plain(value) in _plain_row(allowed)
    else:
        right = value in allowed
    return "" if right else "wrong value"


def _as_float(value: int) -> float | int:
    try:
        return float(value)
    except OverflowError:
        return value


def _told_type(allowed: Sequence[Any]) -> type | None:
    """Of the first allowed value; None where the parameter is only ever left out."""
    return next((type(each) for each in allowed if each != ""), None)


def _items_fit(value: list[Any], allowed: Any, wanted: type) -> bool:
    """Whether the items have the type described, or that of an allowed list."""
    if not isinstance(allowed, list):
        return True
    told = _told_type(allowed)
    return all(type(item) is wanted or (told is not None and type(item) is told) for item in value)


def _is_dict_allowed(value: dict[str, Any], allowed: Sequence[Any]) -> bool:
    """Whether it has the fields of one of the allowed, none missing or more, with values allowed there."""
    return any(
        all(key in each and _plain(field) in _plain_row(each[key]) for key, field in value.items())
        and all(key in value or "" in fields for key, fields in each.items())
        for each in allowed
        if isinstance(each, dict)
    )


def _is_list_of_dicts_allowed(value: list[Any], allowed: Sequence[Any]) -> bool:
    return any(
        len(value) == len(each)
        and all(
            isinstance(one, dict) and _is_dict_allowed(one, [other])
            for one, other in zip(value, each, strict=True)
        )
        for each in allowed
        if _is_row(each)
    )


def _is_row(value: Any) -> bool:
    return isinstance(value, list | str)


def _plain_row(values: Any) -> list[Any]:
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A text without what does not matter."""
    if not isinstance(value, str):
        return value
    return _INSIGNIFICANT.sub("", value).lower().replace("'", '"')
