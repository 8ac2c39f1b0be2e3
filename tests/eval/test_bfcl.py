"""The leaderboard's files: read as they are, and refused with one line where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from leaderboard_files import (
    ADD,
    IRRELEVANCE,
    PARALLEL,
    SIMPLE,
    SIMPLE_ANSWERS,
    TURN,
    question,
    write,
    write_all,
)

from mobilellm.eval.bfcl import holds_questions, question_files, read_questions


def test_a_folder_of_questions(tmp_path: Path) -> None:
    files = question_files(write_all(tmp_path))
    assert [file.name for file in files] == [
        "BFCL_v4_simple_python.json", "BFCL_v4_parallel.json", "BFCL_v4_irrelevance.json"
    ]  # fmt: skip
    assert all(map(holds_questions, files))
    simple, parallel, irrelevance = map(read_questions, files)
    assert [each.category for each in simple + parallel] == ["simple"] * 3 + ["parallel"]
    assert [each.category for each in irrelevance] == ["irrelevance", "live_irrelevance"]
    assert [each.answers for each in simple] == [row["ground_truth"] for row in SIMPLE_ANSWERS]
    assert parallel[0].functions == [ADD, TURN]
    assert parallel[0].messages == [{"role": "user", "content": "Add 1 and 2."}]
    assert irrelevance[0].answers == []


def test_functions_are_shown_as_json_schemas(tmp_path: Path) -> None:
    write_all(tmp_path)
    (one,) = read_questions(tmp_path / "BFCL_v4_parallel.json")
    assert one.tools[0] == {
        "name": "math.add", "description": "Adds.",
        "parameters": {
            "type": "object", "required": ["a"],
            "properties": {
                "a": {"type": "integer"}, "b": {"type": "number"},
                "at": {"type": "array", "items": {"type": "string"}},
            },
        },
    }  # fmt: skip
    by = one.tools[1]["parameters"]["properties"]["by"]
    assert by == {"type": "object", "properties": {"x": {"type": "number"}}}
    assert one.functions[0] is not ADD
    assert one.functions[0] == ADD  # what the answers are checked against stays as it was


@pytest.mark.parametrize(
    ("questions", "answers", "complaint"),
    [
        (SIMPLE, None, r"official answers are missing: neither q\.possible_answer\.json nor possible_answer/q\.json"),
        (SIMPLE, SIMPLE_ANSWERS[:2], r"q\.possible_answer\.json: has no answer to 'simple_python_2' of q\.json"),
        ([question("simple_java_0", "?", ADD)], [], "'simple_java_0' is of no category .* simple, multiple, parallel"),
        ([question("multi_turn_base_0", "?", ADD)], [], "'multi_turn_base_0' is of no category"),
        ([{"id": "simple_0"}], [{"id": "simple_0", "ground_truth": []}], "'simple_0' is not as the leaderboard's"),
        ([question("simple_0", "?")], [{"id": "simple_0", "ground_truth": []}], "not as the leaderboard's"),
        ([question("simple_0", "?", {"name": "f"})], [{"id": "simple_0", "ground_truth": []}], "not as the leader"),
        (
            [question("simple_0", "?", {"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}})],
            [{"id": "simple_0", "ground_truth": []}], "with types of string, integer",
        ),
        ([{"question": 1}], [], "q.json, line 1: is no object with an id"),
        ([[1]], [], "q.json, line 1: is no object with an id"),
        ([], [], "q.json: is empty"),
        (SIMPLE[:1], [{"id": "simple_python_0"}], "'simple_python_0' has no list ground_truth"),
        (SIMPLE[:1], [{"id": "simple_python_0", "ground_truth": [{"f": {}}]}], "the answer to 'simple_python_0' is not"),
        (SIMPLE[:1], [{"id": "simple_python_0", "ground_truth": [{"math.add": {"a": 1}}]}], "allowed values"),
        (SIMPLE[:1], [{"id": "simple_python_0", "ground_truth": [1]}], "allowed values"),
        (SIMPLE[:1], [{"id": "simple_python_0", "ground_truth": [{}]}], "allowed values"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, questions: list[Any], answers: list[Any] | None, complaint: str) -> None:
    file = write(tmp_path / "q.json", questions)
    if answers is not None:
        write(tmp_path / "q.possible_answer.json", answers)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint) as raised:
        read_questions(file)
    assert "\n" not in str(raised.value)


def test_what_is_no_json(tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    file.write_text('{"id": "irrelevance_0"}\n{"id": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"q\.json, line 2: is not JSON"):
        read_questions(file)
    assert not holds_questions(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert not holds_questions(file)


def test_a_folder_without_questions(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="holds no file of questions such as BFCL_v4_simple_python.json"
    ):
        question_files(tmp_path)


def test_irrelevance_needs_no_answers(tmp_path: Path) -> None:
    assert len(read_questions(write(tmp_path / "q.json", IRRELEVANCE))) == 2
    with pytest.raises(FileNotFoundError):
        read_questions(write(tmp_path / "q.json", IRRELEVANCE + PARALLEL))


def test_the_leaderboards_own_files(shared: Path) -> None:
    files = question_files(shared / "toolcall")
    counts = {questions[0].category: len(questions) for questions in map(read_questions, files)}
    assert counts == {"simple": 400, "multiple": 200, "parallel": 200, "irrelevance": 240}
