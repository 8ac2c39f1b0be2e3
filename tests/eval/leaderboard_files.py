"""Files in the leaderboard's shape, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ADD: dict[str, Any] = {
    "name": "math.add",
    "description": "Adds.",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "integer"}, "b": {"type": "float"}, "at": {"type": "tuple", "items": {"type": "any"}}},
        "required": ["a"],
    },
}  # fmt: skip
TURN: dict[str, Any] = {
    "name": "turn",
    "parameters": {"type": "dict", "properties": {"by": {"type": "dict", "properties": {"x": {"type": "float"}}}}},
}  # fmt: skip


def question(name: str, text: str, *functions: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "question": [[{"role": "user", "content": text}]], "function": list(functions)}


SIMPLE = [question(f"simple_python_{number}", f"Add {number}.", ADD) for number in range(3)]
SIMPLE_ANSWERS = [
    {"id": f"simple_python_{number}", "ground_truth": [{"math.add": {"a": [number], "b": ["", 1.0]}}]}
    for number in range(3)
]
PARALLEL = [question("parallel_0", "Add 1 and 2.", ADD, TURN)]
PARALLEL_ANSWERS = [
    {"id": "parallel_0", "ground_truth": [{"math.add": {"a": [1]}}, {"math.add": {"a": [2]}}]}
]
IRRELEVANCE = [
    question("irrelevance_0", "How is the weather?", ADD),
    question("live_irrelevance_1-0-0", "Hi"),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """Answers in both places they are looked for."""
    write(folder / "BFCL_v4_simple_python.json", SIMPLE)
    write(folder / "BFCL_v4_simple_python.possible_answer.json", SIMPLE_ANSWERS)
    write(folder / "BFCL_v4_parallel.json", PARALLEL)
    write(folder / "possible_answer" / "BFCL_v4_parallel.json", PARALLEL_ANSWERS)
    write(folder / "BFCL_v4_irrelevance.json", IRRELEVANCE)
    write(folder / "BFCL_v4_simple_java.json", [question("simple_java_0", "?", ADD)])
    return folder
