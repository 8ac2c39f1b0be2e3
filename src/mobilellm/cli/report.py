"""Draw what a run did, or several compared: loss, learning rate, gradient norm, tokens/s and MFU over tokens.

Writes PNG files, one self-contained HTML page and the numbers as JSON. Runs that go on or were cut off are
read as far as they are. `mobilellm report artefacts DIR` compares the formats one model was exported to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli.tables import print_notes, print_sheet, print_table
from mobilellm.report.written import (
    NOTES,
    difference_rows,
    number_rows,
    read_runs,
    report_json,
    run_labels,
    write_report,
)


@dataclass(frozen=True)
class Arguments:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs (mobilellm train RECIPE --out RUN)."""

    out: Path | None = None
    """Folder of the report. Default: RUN/report for one run, ./report for several."""

    json: bool = False
    """Print one JSON object instead of tables."""


def run(arguments: Arguments) -> None:
    if not arguments.runs:
        raise ValueError("report: name at least one run folder")
    histories = read_runs(arguments.runs)
    out = arguments.out or (arguments.runs[0] / "report" if len(histories) == 1 else Path("report"))
    files = write_report(histories, out)
    if arguments.json:
        print(json.dumps({**report_json(histories), "files": list(map(str, files))}, indent=2))
        return
    labels = run_labels(histories)
    header, *rows = number_rows(histories, labels)
    if len(histories) == 1:
        print_sheet([("run", labels[0]), *((row[0], row[1]) for row in rows)])
    else:
        print_table(header, rows)
        if differing := difference_rows(histories, labels):
            print()
            print_table(("recipe", *differing[0][1:]), differing[1:])
    print_notes([*NOTES, f"Report: {files[0]}"])
