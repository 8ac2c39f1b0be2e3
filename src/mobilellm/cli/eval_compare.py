"""`mobilellm eval compare`: whether one model is better than another, and how sure that is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mobilellm.cli.tables import print_notes, print_table
from mobilellm.eval.compare import Comparison, compare
from mobilellm.eval.record import Record, read
from mobilellm.report.evaluation_written import comparison_notes, comparison_rows, write_comparisons


@dataclass(frozen=True)
class Compare:
    """Paired differences of evaluation records, the first against each other, with 95 % intervals.

    Zero-shot records are compared by task and on average, those of tools by category and figure, perplexity
    and chat records by text. What was not asked the same way of both is refused, not compared.
    """

    records: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="A.json B.json [...]")]
    """Records of one kind, as eval zero-shot, ppl, tools and chat write them."""
    metric: Literal["paper", "acc_norm", "acc"] = "paper"
    """Of zero-shot records."""
    samples: int = 10_000
    """Bootstrap resamples."""
    seed: int = 0
    """Of the resampling."""
    out: Path | None = None
    """Folder for the comparison as Markdown and PNG."""
    json: bool = False
    """Print one JSON object instead of tables."""


def run_compare(arguments: Compare) -> None:
    if len(arguments.records) < 2:
        raise ValueError(f"eval compare: {len(arguments.records)} record is named; name at least two")
    held = _named([read(path) for path in arguments.records], arguments.records)
    comparisons = [
        compare(held[0], other, arguments.metric, arguments.samples, arguments.seed) for other in held[1:]
    ]
    files = []
    numbers = {"comparisons": [asdict(each) for each in comparisons]}
    if arguments.out is not None:
        records = [(each.model.name, each) for each in held]
        files = write_comparisons(arguments.out, comparisons, records, numbers)
    if arguments.json:
        print(json.dumps({**numbers, "files": [str(file) for file in files]}, indent=1))
        return
    for number, each in enumerate(comparisons):
        _print(each, first=number == 0)
    print_notes([*comparison_notes(comparisons[0]), *(f"Written: {file}" for file in files[:1])])


def _print(comparison: Comparison, first: bool) -> None:
    if not first:
        print()
    metric = f", metric {comparison.metric}" if comparison.metric else ""
    print(f"{comparison.b} (second) against {comparison.a} (first){metric}")
    print()
    header, *lines = comparison_rows(comparison)
    print_table(header, lines)


def _named(held: list[Record], paths: tuple[Path, ...]) -> list[Record]:
    """Two records of one name are told apart by their files."""
    names = [each.model.name for each in held]
    return [
        each
        if names.count(each.model.name) == 1
        else replace(each, model=replace(each.model, name=f"{each.model.name} ({path})"))
        for each, path in zip(held, paths, strict=True)
    ]
