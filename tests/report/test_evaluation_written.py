"""Evaluations in writing: whole tables, safe Markdown, a folder that spoils nothing of others'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation_records import all_eight, identity, perplexity
from mobilellm.eval.compare import compare
from mobilellm.eval.published import find, published
from mobilellm.eval.table import Measured, entries
from mobilellm.report.evaluation_written import (
    comparison_rows,
    table_markdown,
    write_comparisons,
    write_table,
)

OPT = find("OPT-125M")
A, B = all_eight(0.4, model=identity("a")), all_eight(0.5, seed=1, model=identity("b"))


def cells(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("| ")
    ]


def test_a_table_has_every_system_and_equal_columns() -> None:
    text = table_markdown(entries(["125m", "350m", "600m", "1b", "1.5b"], [Measured("mine", OPT, A)]), "acc")
    found = cells(text)
    assert {len(line) for line in found} == {10}
    assert {system.name for system in published()} <= {line[0] for line in found}
    assert "| OPT-125M | 41.3 | 25.2 | 57.5 | 62.0 | 41.9 | 31.1 | 31.2 | 50.8 | 42.6 |" in text
    assert "| ↳ ours: mine |" in text
    assert "| ↳ difference |" in text
    assert "acc: lm-eval's" in text


def test_comparisons_say_what_they_found() -> None:
    header, *lines = comparison_rows(compare(A, B))
    assert [line[0] for line in lines][0::8] == ["ARC-e", "average"]
    assert {len(line) for line in lines} == {len(header)}
    row = compare(A, B).rows[0]
    assert lines[0][3] == f"{100 * row.difference:+.1f}"
    assert lines[0][4] == f"{100 * row.low:+.1f} … {100 * row.high:+.1f}"
    header, line = comparison_rows(compare(perplexity([5000.0, 6000.0]), perplexity([5000.0, 5500.0])))
    assert len(line) == len(header)
    assert line[0] == "wikitext2 (reference)"
    assert line[5].endswith(" a token")


def test_a_folder_of_tables(tmp_path: Path) -> None:
    found = entries(["125m"], [Measured("mine", OPT, A)])
    texts = [("mine", perplexity([5000.0])), ("mine", perplexity([800.0], protocol="document"))]
    files = write_table(tmp_path / "out", found, "paper", texts, {"metric": "paper"})
    assert [file.name for file in files] == [
        "evaluation.md", "accuracy.png", "perplexity-1.png", "perplexity-2.png", "evaluation.json",
    ]  # fmt: skip
    assert all(file.is_file() for file in files)
    page = files[0].read_text(encoding="utf-8")
    assert all(f"]({file.name})" in page for file in files if file.suffix == ".png")
    assert json.loads(files[-1].read_text())["metric"] == "paper"
    # A second report replaces its own files, and takes away those it no longer has.
    write_table(tmp_path / "out", found, "paper", texts[:1], {})
    assert not (tmp_path / "out" / "perplexity-2.png").exists()
    write_comparisons(tmp_path / "out", [compare(A, B)], [("a", A), ("b", B)], {})
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "difference.png", "evaluation.json", "evaluation.md",
    ]  # fmt: skip


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "difference.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"difference\.png: is there and no report made it"):
        write_comparisons(tmp_path, [compare(A, B)], [], {})
    assert [file.name for file in tmp_path.iterdir()] == ["difference.png"]
    (tmp_path / "evaluation.json").write_text(
        json.dumps(
            {"format": "mobilellm-evaluation-report-1", "files": ["../x", "notes.png", "evaluation.json"]}
        )
    )
    (tmp_path / "notes.png").write_text("mine")
    write_table(tmp_path, entries(["125m"], []), "acc", [], {})
    assert (tmp_path / "notes.png").read_text() == "mine"  # a list somebody wrote does not make it ours


def test_names_cannot_break_a_table() -> None:
    measured = [Measured("a | b\n<script>", None, A)]
    text = table_markdown(entries([], measured), "acc")
    (line,) = [line for line in text.splitlines() if "script" in line]
    assert line.startswith("| a \\| b &lt;script> | ")
