"""Local rows that are not as they must be: one line with the file, the line, the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import task_rows

from mobilellm.eval.task_files import read_task_file
from mobilellm.eval.tasks import BY_NAME

NAMES = list(BY_NAME)


def read(folder: Path, task: str) -> Any:
    return read_task_file(folder, BY_NAME[task].folders, BY_NAME[task].splits, task)


@pytest.mark.parametrize("task", NAMES)
def test_both_shapes_are_read_and_known_fields_kept(task: str, tmp_path: Path) -> None:
    for name, rows in (("hub", task_rows.HUB[task]), ("local", task_rows.local(task))):
        task_rows.write(tmp_path / name, {task: rows})
        file, kept = read(tmp_path / name, task)
        assert kept == [{field.name: row[field.name] for field in file.shape.fields} for row in rows]
        assert file.split == task_rows.split(task)
        assert len(file.sha256) == 64


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    task_rows.write(tmp_path, {"piqa": task_rows.HUB["piqa"]})
    file = tmp_path / "piqa" / "validation.jsonl"
    file.write_text("\n" + file.read_text() + "\n\n")
    assert read(tmp_path, "piqa")[1] == task_rows.HUB["piqa"]


@pytest.mark.parametrize("task", NAMES)
def test_each_field_is_missed(task: str, tmp_path: Path) -> None:
    for name, rows in (("hub", task_rows.HUB[task]), ("local", task_rows.local(task))):
        file, _ = read(task_rows.write(tmp_path / name, {task: rows}), task)
        for field in file.shape.fields:
            fewer = [rows[0], {key: value for key, value in rows[1].items() if key != field.name}]
            folder = task_rows.write(tmp_path / f"{name}-{field.name}", {task: fewer})
            with pytest.raises(
                ValueError, match=rf"{task_rows.split(task)}\.jsonl:2: no field {field.name};"
            ):
                read(folder, task)


@pytest.mark.parametrize("task", NAMES)
def test_each_field_of_a_wrong_type_is_refused(task: str, tmp_path: Path) -> None:
    for name, rows in (("hub", task_rows.HUB[task]), ("local", task_rows.local(task))):
        file, _ = read(task_rows.write(tmp_path / name, {task: rows}), task)
        for field in file.shape.fields:
            for number, wrong in enumerate((None, 7.5, ["x"], {"text": ["a", "b"]}, -1, 99)):
                folder = task_rows.write(
                    tmp_path / f"{name}-{field.name}-{number}", {task: [{**rows[0], field.name: wrong}]}
                )
                with pytest.raises(
                    ValueError, match=rf"\.jsonl:1: {field.name} is .*; it must be "
                ) as caught:
                    read(folder, task)
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "change", "complaint"),
    [
        ("winogrande", {"sentence": "No gap here."}, 'sentence is "No gap here."; it must be a text with the gap'),
        ("winogrande", {"answer": "3"}, 'answer is "3"; it must be "1" or "2"'),
        ("winogrande", {"answer": 1}, 'answer is 1; it must be "1" or "2"'),
        ("social_iqa", {"label": "4"}, 'label is "4"; it must be "1", "2" or "3"'),
        ("piqa", {"label": True}, "label is true; it must be 0 or 1"),
        ("piqa", {"sol2": ""}, 'sol2 is ""; it must be a text, not empty'),
        ("arc_easy", {"answerKey": "D"}, 'answerKey is "D"; it must be one of the labels of choices'),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "it must be an object"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A"]}}, "it must be an object"),
        ("hellaswag", {"label": "4"}, 'label is "4"; it must be the number of one of the endings'),
        ("hellaswag", {"label": 2}, "label is 2; it must be the number of one of the endings from 0, as a text"),
        ("hellaswag", {"endings": ["a", ""]}, "it must be a list of two or more texts, none empty"),
    ],
)  # fmt: skip
def test_values_out_of_range(task: str, change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    folder = task_rows.write(tmp_path, {task: [{**task_rows.HUB[task][0], **change}]})
    with pytest.raises(ValueError, match=r"\.jsonl:1: ") as caught:
        read(folder, task)
    assert complaint in str(caught.value)


def test_a_label_beyond_the_choices(tmp_path: Path) -> None:
    row = task_rows.local("openbookqa")[0]
    folder = task_rows.write(tmp_path, {"openbookqa": [{**row, "label": 4}]})
    with pytest.raises(ValueError, match="label is 4; it must be the number of one of the choices, from 0"):
        read(folder, "openbookqa")


def test_a_misnamed_field_says_what_there_is_and_what_is_needed(tmp_path: Path) -> None:
    rows = [{"goal": "x", "solution1": "y", "sol2": "z", "label": 0}]
    with pytest.raises(ValueError) as caught:
        read(task_rows.write(tmp_path, {"piqa": rows}), "piqa")
    file = tmp_path / "piqa" / "validation.jsonl"
    assert str(caught.value) == (
        f"{file}:1: no field sol1; it has goal, solution1, sol2, label, and needs goal, sol1, sol2, label"
    )


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda content: content[:-20],
            r"piqa.validation\.jsonl:2: is no JSON \(.*\); is the file cut off\?",
        ),
        (lambda content: content + b'"text"\n', r'validation\.jsonl:3: is "text", not a JSON object'),
        (lambda content: b"", r"validation\.jsonl: holds no rows"),
        (lambda content: b"\n \n", r"validation\.jsonl: holds no rows"),
        (lambda content: b"\xff\xfe" + content, r"validation\.jsonl:1: is no JSON \("),
        (lambda content: content.replace(b"Push", b"P\xffsh"), r"validation\.jsonl:1: is no JSON \("),
    ],
)
def test_files_that_are_no_json_lines(
    spoil: Callable[[bytes], bytes], complaint: str, tmp_path: Path
) -> None:
    task_rows.write(tmp_path, {"piqa": task_rows.HUB["piqa"]})
    file = tmp_path / "piqa" / "validation.jsonl"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=complaint) as caught:
        read(tmp_path, "piqa")
    assert "\n" not in str(caught.value)


def test_absent_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: is no folder"):
        read(tmp_path / "nowhere", "piqa")
    with pytest.raises(
        FileNotFoundError, match=r"holds no data for piqa: it must have piqa.validation\.jsonl"
    ):
        read(tmp_path, "piqa")
    with pytest.raises(
        FileNotFoundError, match=r"must have arc_easy.test\.jsonl or arc_easy.validation\.jsonl"
    ):
        read(tmp_path, "arc_easy")
