"""A student with a teacher against the same student without one, on real text, at equal steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "distillation.py"


@pytest.mark.slow
def test_where_text_is_scarce_the_student_of_a_teacher_is_better(tmp_path: Path, shared: Path) -> None:
    """As docs/results/distillation.md has it: three seeds, the interval of the differences above nought."""
    corpus = shared / "corpus"
    stories = (corpus / "tinystories_v2_10k_lines.txt").read_text("utf-8").split("<|endoftext|>")
    # A blank line divides paragraphs there, a single line break stories.
    stories += re.split(r"(?<!\n)\n(?!\n)", (corpus / "tinystories_sample_944k.txt").read_text("utf-8"))
    with (tmp_path / "stories.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": story.strip()}) + "\n" for story in stories if story.strip())
    out = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, BENCHMARK, tmp_path / "work", file.name, "--regimes", "little", "--json", out],
        check=True,
    )
    result = json.loads(out.read_text())["regimes"]["little"]
    low, high = result["interval"]
    print(f"better by {result['gain']:.3f} nats a token ({low:.3f} … {high:.3f})")
    assert low > 0
