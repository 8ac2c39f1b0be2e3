"""Questions of the Berkeley Function-Calling Leaderboard with their official answers, from its own files.

A file of questions (`BFCL_v4_simple_python.json`, JSON lines of id, question, function) and one of answers
(id, ground_truth), which lies beside it as in the leaderboard's repository (`possible_answer/` and the same
name) or as `BFCL_v4_simple_python.possible_answer.json`. A question's category is told by its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.eval.call_matching import TYPES

CATEGORIES = ("simple", "multiple", "parallel", "parallel_multiple", "irrelevance")
"""Of Python functions and one turn; each also as live_…, with questions that users asked."""
NO_CALL = "irrelevance"
"""The category whose right answer is not to call."""

_CATEGORY = f"((?:live_)?(?:{'|'.join(CATEGORIES)}))(?:_python)?"
_ID, _FILE = re.compile(rf"{_CATEGORY}_\d[\d-]*"), re.compile(rf"BFCL_v\d+_{_CATEGORY}\.json")
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""The leaderboard's names of types -> those of JSON schemas, as it shows them to models with tool calling."""


@dataclass(frozen=True)
class Question:
    id: str
    category: str
    messages: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    """As the leaderboard describes them: the answers are checked against these."""
    answers: list[dict[str, dict[str, list[Any]]]]
    """One for each call; none where none is right."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The functions as a model is shown them: parameters as a JSON schema."""
        return [{**function, "parameters": _schema(function["parameters"])} for function in self.functions]


def question_files(folder: Path) -> list[Path]:
    """The leaderboard's files of questions of these categories in a folder, by category.

    Raises FileNotFoundError where there is none.
    """
    found = [(match[1], file) for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))]
    if not found:
        raise FileNotFoundError(f"{folder}: holds no file of questions such as BFCL_v4_simple_python.json")
    return [file for _, file in sorted(found, key=lambda each: _rank(each[0]))]


def _rank(category: str) -> tuple[bool, int]:
    return category.startswith("live_"), CATEGORIES.index(category.removeprefix("live_"))


def holds_questions(path: Path) -> bool:
    """Whether a file looks like one of questions: by its first line."""
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and {"id", "question", "function"} <= first.keys()


def read_questions(path: Path) -> list[Question]:
    """Questions and their answers, in the file's order.

    Raises FileNotFoundError or ValueError with one line for answers that are missing, in part too, for a
    category that is not known, and for files of another shape.
    """
    rows = list(_rows(path))
    categories = [_category(path, row) for row in rows]
    needs_answers = any(not category.endswith(NO_CALL) for category in categories)
    answers = _answers(path) if needs_answers else {}
    questions = []
    for row, category in zip(rows, categories, strict=True):
        wanted = [] if category.endswith(NO_CALL) else answers.get(row["id"])
        if wanted is None:
            raise ValueError(f"{_answers_file(path)}: has no answer to {row['id']!r} of {path.name}")
        messages, functions = _asked(path, row, may_lack_functions=category.endswith(NO_CALL))
        _check_answers(path, row["id"], functions, wanted)
        questions.append(Question(row["id"], category, messages, functions, wanted))
    if not questions:
        raise ValueError(f"{path}: is empty; there is nothing to ask")
    return questions


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise ValueError(
                f"{path}, line {number}: is no object with an id, as the leaderboard's lines are"
            )
        yield row


def _category(path: Path, row: Mapping[str, Any]) -> str:
    if found := _ID.fullmatch(row["id"]):
        return found[1]
    raise ValueError(
        f"{path}: {row['id']!r} is of no category that is matched here; those are {', '.join(CATEGORIES)}, "
        "of Python functions, and the same with live_ before"
    )


def _asked(
    path: Path, row: Mapping[str, Any], may_lack_functions: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    match row:
        case {"question": [[_, *_] as messages], "function": [*functions]} if functions or may_lack_functions:
            if all(isinstance(message, dict) for message in messages) and all(map(_is_described, functions)):
                return messages, functions
    raise ValueError(
        f"{path}: {row['id']!r} is not as the leaderboard's questions are: question [[messages]] of one "
        f"turn, function [{{name, parameters {{properties}}}}] with types of {', '.join(TYPES)}"
    )


def _is_described(function: Any) -> bool:
    match function:
        case {"name": str(), "parameters": {"properties": dict() as properties}}:
            return all(_has_type(described) for described in properties.values())
    return False


def _has_type(described: Any) -> bool:
    match described:
        case {"type": "array" | "tuple", "items": {"type": str(inner)}}:
            return inner in TYPES
        case {"type": str(kind)}:
            return kind in TYPES and kind not in ("array", "tuple")
    return False


def _answers_file(path: Path) -> Path:
    places = (
        path.with_name(f"{path.stem}.possible_answer{path.suffix}"),
        path.parent / "possible_answer" / path.name,
    )
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{path}: its official answers are missing: neither {places[0].name} nor possible_answer/{path.name} "
        "lies beside it"
    )


def _answers(path: Path) -> dict[str, list[dict[str, dict[str, list[Any]]]]]:
    file = _answers_file(path)
    answers = {}
    for row in _rows(file):
        if not isinstance(row.get("ground_truth"), list):
            raise ValueError(f"{file}: {row['id']!r} has no list ground_truth, so it is no file of answers")
        answers[row["id"]] = row["ground_truth"]
    return answers


def _check_answers(
    path: Path, name: str, functions: Sequence[Mapping[str, Any]], answers: Sequence[Any]
) -> None:
    names = {function["name"] for function in functions}
    for answer in answers:
        match answer:
            case dict() if (
                len(answer) == 1 and all(map(_is_allowed, answer.values())) and names >= answer.keys()
            ):
                continue
        raise ValueError(
            f"{_answers_file(path)}: the answer to {name!r} is not "
            "{function: {parameter: [allowed values]}} for a function of the question"
        )


def _is_allowed(parameters: Any) -> bool:
    return isinstance(parameters, dict) and all(isinstance(each, list) for each in parameters.values())


def _schema(described: Any) -> Any:
    if isinstance(described, list):
        return [_schema(each) for each in described]
    if not isinstance(described, dict):
        return described
    shown = {
        key: _schema(value) if key in ("properties", "items") else value for key, value in described.items()
    }
    if "properties" in described and isinstance(described["properties"], dict):
        shown["properties"] = {name: _schema(each) for name, each in described["properties"].items()}
    if isinstance(kind := described.get("type"), str):
        shown["type"] = _JSON_TYPES.get(kind, kind)
    return shown
