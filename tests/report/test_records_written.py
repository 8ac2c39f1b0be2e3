"""Records in writing: a table of each kind, and how they were made."""

from __future__ import annotations

from evaluation_records import all_eight, chat, identity, perplexity, tools, zero_shot
from mobilellm.report.records_written import records_markdown

A = all_eight(0.4, model=identity("a"))


def cells(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("| ")
    ]


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


def test_records_of_tools_and_of_chat() -> None:
    """Every figure with what it is a share of and its interval; of one conversation there is none."""
    several, alone, talk, silent = (
        tools(),
        tools("one.json", lone=True),
        chat(),
        chat("other.json", answered=0),
    )
    text = records_markdown([("a", several), ("b", alone), ("a", talk), ("b", silent)])
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Tool calling, %", "## Chat", "## How they were made"]
    found = cells(text)
    assert ["a", "simple", "right", "1,200", "0.0", "0.0 … 0.3"] in found
    assert ["a", "talks.json", "exact match of the whole call", "4", "25.0", "10.0 … 90.0"] in found
    assert ["a", "talks.json", "ROUGE-1 of responses", "6", "12.5", "10.0 … 90.0"] in found
    assert ["b", "one.json", "exact match of intent", "4", "50.0", "-"] in found
    assert [
        "a", "talks.json", "1,200", "34,000", "2.000", "1.900 … 2.125", "7.39", "0.750", "8", "50.0",
        "25.0 … 75.0", "12.5", "12.5",
    ] in found  # fmt: skip
    (line,) = [line for line in found if line[:2] == ["b", "other.json"]]
    assert line[8:] == ["0", "-", "-", "-", "-"]
