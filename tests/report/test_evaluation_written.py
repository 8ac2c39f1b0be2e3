"""Evaluations in writing: whole tables, safe Markdown, a folder that spoils nothing of others'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation_records import all_eight, identity, perplexity, zero_shot
from mobilellm.eval.compare import compare
from mobilellm.eval.published import find, published
from mobilellm.eval.table import Measured, entries
from mobilellm.report.evaluation_written import (
    comparison_rows,
    records_markdown,
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


def test_records_by_kind_with_how_they_were_made() -> None:
    text = records_markdown(
        [("a", A), ("part", zero_shot({"piqa": [1, 0]})), ("t", perplexity([5000.0, 6000.0]))]
    )
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Zero-shot accuracy, %", "## Perplexity", "## How they were made"]
    accuracy = [line for line in cells(text) if line[0] == "a" and line[1] in ("acc", "acc_norm", "paper")]
    assert [line[1] for line in accuracy] == ["paper", "acc_norm", "acc"]
    assert accuracy[0][2] == f"{100 * A.results['arc_easy']['paper']:.1f} ± 1.0"
    boolq = f"{100 * A.results['boolq']['acc']:.1f} ± 1.0"
    assert accuracy[1][4] == accuracy[2][4] == boolq  # has no acc_norm: acc with its error stands in
    (part,) = [line for line in cells(text) if line[:2] == ["part", "paper"]]
    assert part[2] == part[-1] == "-"
    result = perplexity([5000.0, 6000.0]).results["wikitext2"]
    assert ["t", "wikitext2", "reference", "4,094", f"{result['token_perplexity']:.3f}", f"{result['word_perplexity']:.3f}", f"{result['bits_per_byte']:.4f}"] in cells(text)  # fmt: skip
    made = [line for line in cells(text) if line[0] == "t"][-1]
    for fact in (
        "2026-01-02",
        "abc1234",
        "Some CPU (avx2), 2 cores",
        "name reference, window 2048",
        "f" * 16,
    ):
        assert fact in made
    assert records_markdown([]) == ""


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
