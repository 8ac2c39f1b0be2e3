"""The eight tasks' data as JSON lines: which shapes of rows are read, and what is wrong with one that is not.

    FOLDER/arc_easy/test.jsonl          id, question, choices, label        or the Hub's fields
    FOLDER/arc_challenge/test.jsonl     the same
    FOLDER/boolq/validation.jsonl       passage, question, answer           or label
    FOLDER/piqa/validation.jsonl        goal, sol1, sol2, label
    FOLDER/social_i_qa/validation.jsonl  context, question, answerA, answerB, answerC, label
    FOLDER/hellaswag/validation.jsonl   query, choices, gold                or the Hub's fields
    FOLDER/openbookqa/test.jsonl        id, question, choices, label        or the Hub's fields
    FOLDER/winogrande/validation.jsonl  sentence, option1, option2, answer

Further fields do no harm. Nothing here imports lm-eval or touches the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Field(NamedTuple):
    name: str
    what: str
    """Completes "must be ..."."""
    right: Callable[[Any, Row], bool]
    """Of the value and its row."""


class Shape(NamedTuple):
    """Rows of one set of fields, and what the registered task must be told so that it can read them."""

    fields: tuple[Field, ...]
    settings: Mapping[str, Any] = {}
    note: str | None = None
    """What to say beside a number made from such rows."""


class TaskFile(NamedTuple):
    path: Path
    split: str
    """ "test" or "validation"."""
    sha256: str
    shape: Shape


def read_task_file(
    folder: Path, names: Sequence[str], splits: Sequence[str], task: str
) -> tuple[TaskFile, list[Row]]:
    """Find, read and check a task's rows: the first of the splits that is there. Rows keep only known fields.

    Raises FileNotFoundError, or ValueError with one line that names file, line and field.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: is no folder; the zero-shot data is looked for in it")
    wanted = [folder / name / f"{split}.jsonl" for name in names for split in splits]
    path = next((path for path in wanted if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder}: holds no data for {task}: it must have {' or '.join(_below(wanted, folder))}"
        )
    content = path.read_bytes()
    rows = _rows(path, content)
    shape = _nearest(rows[0][1], SHAPES[task])
    for number, row in rows:
        _check(f"{path}:{number}", row, shape)
    kept = [{field.name: row[field.name] for field in shape.fields} for _, row in rows]
    return TaskFile(path, path.stem, hashlib.sha256(content).hexdigest(), shape), kept


def _below(paths: Sequence[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def _rows(path: Path, content: bytes) -> list[tuple[int, Row]]:
    """(line, row) of every line that is not blank."""
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # not UTF-8 or not JSON
            raise ValueError(f"{path}:{number}: is no JSON ({error}); is the file cut off?") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: is {_named(row)}, not a JSON object with the task's fields")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def _nearest(first: Row, shapes: Sequence[Shape]) -> Shape:
    """The shape of whose fields the first row lacks fewest: none, or else what it will be refused for."""
    return min(shapes, key=lambda shape: sum(field.name not in first for field in shape.fields))


def _check(where: str, row: Row, shape: Shape) -> None:
    if missing := [field.name for field in shape.fields if field.name not in row]:
        has, needed = ", ".join(row) or "none", ", ".join(field.name for field in shape.fields)
        raise ValueError(f"{where}: no field {', '.join(missing)}; it has {has}, and needs {needed}")
    for field in shape.fields:
        value = row[field.name]
        if not field.right(value, row):
            raise ValueError(f"{where}: {field.name} is {_named(value)}; it must be {field.what}")


def _named(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# The fields


def _text(*names: str) -> tuple[Field, ...]:
    return tuple(
        Field(name, "a text, not empty", lambda value, row: isinstance(value, str) and value != "")
        for name in names
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(x, str) and x for x in value)


def _choices(name: str) -> Field:
    return Field(name, "a list of two or more texts, none empty", lambda value, row: _texts(value))


def _number(name: str, what: str, count: Callable[[Row], int]) -> Field:
    """An index: JSON's true and false are none."""
    return Field(name, what, lambda value, row: type(value) is int and 0 <= value < count(row))


def _number_of(name: str, choices: str) -> Field:
    def count(row: Row) -> int:
        return len(row[choices])

    return _number(name, f"the number of one of the {choices}, from 0", count)


_LETTERED = Field(
    "choices",
    'an object {"text": [two or more texts], "label": [a letter for each]}',
    lambda value, row: (
        isinstance(value, dict)
        and _texts(value.get("text"))
        and _texts(value.get("label"))
        and len(value["text"]) == len(value["label"])
    ),
)
_ANSWER_KEY = Field(
    "answerKey",
    "one of the labels of choices",
    lambda value, row: isinstance(value, str) and value.lstrip() in row["choices"]["label"],
)
_ARC_KEY = _ANSWER_KEY._replace(
    right=lambda value, row: isinstance(value, str) and value in row["choices"]["label"]
)
_ONE_OF_TWO = _number("label", "0 or 1", lambda row: 2)
_LABELLED = {"doc_to_choice": "choices", "doc_to_target": "label", "should_decontaminate": False}
"""Settings for rows whose choices are a plain list and whose label is the number of the right one."""

_ARC = (
    Shape((*_text("question"), _LETTERED, _ARC_KEY)),
    Shape((*_text("question"), _choices("choices"), _number_of("label", "choices")), _LABELLED),
)

SHAPES: dict[str, tuple[Shape, ...]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "boolq": (
        Shape((*_text("passage", "question"), _ONE_OF_TWO)),
        Shape(
            (
                *_text("passage", "question"),
                Field("answer", "true or false", lambda value, row: isinstance(value, bool)),
            ),
            {"doc_to_target": "{{answer|int}}"},
        ),
    ),
    "piqa": (Shape((*_text("goal", "sol1", "sol2"), _ONE_OF_TWO)),),
    "social_iqa": (
        Shape(
            (
                *_text("context", "question", "answerA", "answerB", "answerC"),
                Field("label", '"1", "2" or "3"', lambda value, row: value in ("1", "2", "3")),
            )
        ),
    ),
    "hellaswag": (
        Shape(
            (
                *_text("activity_label", "ctx_a"),
                Field("ctx_b", "a text", lambda value, row: isinstance(value, str)),  # often empty
                _choices("endings"),
                Field(
                    "label",
                    'the number of one of the endings from 0, as a text ("2")',
                    lambda value, row: value in [str(i) for i in range(len(row["endings"]))],
                ),
            )
        ),
        Shape(
            (*_text("query"), _choices("choices"), _number_of("gold", "choices")),
            {"process_docs": None, "doc_to_target": "gold"},
            note=(
                "HellaSwag: the local file's text is preprocessed (of 1,000 prompts 617 equal lm-eval's, "
                "most others differ in letter case): its figures are near lm-eval's, not equal to them"
            ),
        ),
    ),
    "openbookqa": (
        Shape((*_text("question_stem"), _LETTERED, _ANSWER_KEY)),
        Shape(
            (*_text("question"), _choices("choices"), _number_of("label", "choices")),
            {"doc_to_text": "question", **_LABELLED},
        ),
    ),
    "winogrande": (
        Shape(
            (
                Field(
                    "sentence",
                    'a text with the gap "_"',
                    lambda value, row: isinstance(value, str) and "_" in value,
                ),
                *_text("option1", "option2"),
                Field("answer", '"1" or "2"', lambda value, row: value in ("1", "2")),
            )
        ),
    ),
}
"""Task -> shapes of its rows; the Hub's own, for which the registered task needs no word, first."""
