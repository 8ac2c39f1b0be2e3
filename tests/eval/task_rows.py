"""Hand-made rows of the eight tasks: in the Hub's fields, and in those of the local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HUB: dict[str, list[Row]] = {
    "arc_easy": [
        {"id": "1", "question": "What falls?", "choices": {"text": ["a stone", "a star", "night"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"id": "2", "question": "What is 2 + 2?", "choices": {"text": ["4", "22"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
    "arc_challenge": [
        {"id": "1", "question": "Why\nis it dark?", "choices": {"text": ["night", "a cave"], "label": ["A", "B"]}, "answerKey": "A"},
        {"id": "2", "question": "Who?", "choices": {"text": ["I", "you", "we"], "label": ["A", "B", "C"]}, "answerKey": "C"},
    ],
    "boolq": [
        {"question": "is water wet", "passage": "Water wets.", "idx": 0, "label": 1},
        {"question": "is it dry", "passage": "It rains.", "idx": 1, "label": 0},
    ],
    "piqa": [
        {"goal": "How to open a door?", "sol1": "Push it.", "sol2": "Eat it.", "label": 0},
        {"goal": "Cool tea", "sol1": "heat it", "sol2": "wait a while", "label": 1},
    ],
    "social_iqa": [
        {"context": "Ann left.", "question": "Why?", "answerA": "she was tired", "answerB": "to stay", "answerC": "rain", "label": "3"},
        {"context": "Bo ate.", "question": "How does Bo feel?", "answerA": "full", "answerB": "hungry", "answerC": "sad", "label": "1"},
    ],
    "hellaswag": [
        {"ind": 4, "activity_label": "Cooking", "ctx_a": "A man is cooking.", "ctx_b": "he", "ctx": "", "endings": ["eats [it].", "sings.", "takes  off", "sleeps"], "label": "2", "source_id": "x", "split": "val", "split_type": "indomain"},
        {"ind": 5, "activity_label": "Knots", "ctx_a": "[header] How to tie [title] Start.", "ctx_b": "", "ctx": "", "endings": ["pull", "cut it", "wait a", "run"], "label": "0", "source_id": "y", "split": "val", "split_type": "indomain"},
    ],
    "openbookqa": [
        {"id": "1", "question_stem": "The sun is", "choices": {"text": ["hot", "cold stuff", "a cat", "wet"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"},
        {"id": "2", "question_stem": "Ice is", "choices": {"text": ["fire", "frozen water", "tin", "air"], "label": ["A", "B", "C", "D"]}, "answerKey": " B"},
    ],
    "winogrande": [
        {"sentence": "Ann beat Bea because _ was faster.", "option1": "Ann", "option2": "Bea", "answer": "1"},
        {"sentence": "The cup fell off the table so _ broke.", "option1": "the table", "option2": "the cup", "answer": "2"},
    ],
}  # fmt: skip

TEST_SPLIT = ("arc_easy", "arc_challenge", "openbookqa")
"""Tasks of which lm-eval scores the test split; of the others the validation split."""


def local(task: str) -> list[Row]:
    """The same documents in the fields of the local files; for HellaSwag as lm-eval would have made them."""
    rows = HUB[task]
    if task in TEST_SPLIT:
        return [
            {
                "id": row["id"],
                "question": row.get("question") or row["question_stem"],
                "choices": row["choices"]["text"],
                "label": row["choices"]["label"].index(row["answerKey"].strip()),
            }
            for row in rows
        ]
    if task == "boolq":
        return [
            {"question": row["question"], "passage": row["passage"], "answer": row["label"] == 1}
            for row in rows
        ]
    if task == "hellaswag":
        return [
            {"ind": 0, "query": "Cooking: A man is cooking. He", "choices": ["eats .", "sings.", "takes off", "sleeps"], "gold": 2},
            {"ind": 1, "query": "Knots: How to tie. Start.", "choices": ["pull", "cut it", "wait a", "run"], "gold": 0},
        ]  # fmt: skip
    return rows


def split(task: str) -> str:
    return "test" if task in TEST_SPLIT else "validation"


def write(folder: Path, rows: dict[str, list[Row]]) -> Path:
    """The layout of the local folder."""
    for task, some in rows.items():
        file = folder / task.replace("social_iqa", "social_i_qa") / f"{split(task)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder
