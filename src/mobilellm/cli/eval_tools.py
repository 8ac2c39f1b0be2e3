"""`mobilellm eval tools`: whether models call the right functions with the right arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.cli.eval_model import ModelOptions, scored_model
from mobilellm.cli.eval_outputs import (
    PRINTED,
    file_names,
    is_printed,
    keep_record,
    output_file,
    print_records,
)

if TYPE_CHECKING:
    from mobilellm.eval.record import Record


@dataclass(frozen=True)
class Tools:
    """Tool calling: the Berkeley leaderboard's questions by its rules, API calling in conversations.

    Answers are greedy and kept as they come: after Ctrl-C the same command goes on. Several models are shown
    side by side; eval compare tells from their records how sure a difference is.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model directories, training runs, .gguf files, directories of exports, or Hub ids (org/name)."""
    data: tuple[Path, ...] = ()
    """The leaderboard's BFCL_*.json, a folder with several, or files of conversations with tools."""
    held_out: float | None = None
    """Of files of conversations only the share that finetune held out (0.05 unless it was told another)."""
    limit: int | None = None
    """Only so many questions of each category and conversations of each file, the first ones."""
    max_tokens: int = 256
    """Longest answer."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """Write a record: a file, or for several models a folder with one file each; - prints them in place of
    the table."""
    answers: Annotated[Path | None, tyro.conf.arg(metavar="OUT.jsonl")] = None
    """Write every answer and what was found wrong with it; for several models a folder. Of one model - prints
    them in place of the table."""
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def run_tools(arguments: Tools) -> None:
    names = file_names("eval tools", arguments.models, (arguments.json, arguments.answers))
    printed = is_printed(json=arguments.json, answers=arguments.answers)
    if arguments.answers == PRINTED and len(names) > 1:
        raise ValueError("answers = - goes with one model; for several name a folder")
    if not arguments.data:
        raise ValueError(
            "eval tools: --data names no file of questions; it takes BFCL files and conversations"
        )
    from mobilellm.eval.tools import evaluate_tools, read_tool_data

    data = read_tool_data(arguments.data, arguments.held_out, arguments.limit)
    records: list[Record] = []
    try:
        for source, name in zip(arguments.models, names, strict=True):
            with scored_model(source, arguments.options, "answers") as opened:
                found = evaluate_tools(
                    opened.model, data, arguments.max_tokens, opened.progress, opened.counts
                )
            records.append(found.record)
            keep_record(found.record, arguments.json, name, len(names))
            if arguments.answers:
                _write_lines(output_file(arguments.answers, name, ".jsonl", len(names)), found.answers)
    finally:  # what is finished is shown, whatever became of the rest
        if records and not printed:
            print_tools(records)
    if arguments.json == PRINTED:
        print_records(records)


def print_tools(records: Sequence[Record]) -> None:
    """One model in detail; several side by side."""
    from mobilellm.cli.tables import print_notes, print_table

    if len(records) == 1:
        (record,) = records
        _print_one(record)
    else:
        rows = {row: None for record in records for row in _figures(record)}
        print_table(
            ("%", *(record.model.name for record in records)),
            [(row, *(_figures(record).get(row, "–") for record in records)) for row in rows],
        )
    print_notes(
        [
            *dict.fromkeys(note for record in records for note in record.protocol["notes"]),
            "in brackets: 95 % intervals",
        ]
    )


def _print_one(record: Record) -> None:
    from mobilellm.cli.tables import print_sheet, print_table
    from mobilellm.eval.record import FIGURES_OF_TOOLS

    print_sheet([("model", f"{record.model.name} ({record.model.backend}, {record.model.dtype})")])
    questions = {name: each for name, each in record.results.items() if "questions" in each}
    if questions:
        print()
        print_table(
            ("category", "questions", "right, %", "95 %", "no call", "cut off", "over context", "faults"),
            [
                (
                    name, f"{each['questions']:,}", _percent(each["accuracy"]), _interval(each, "accuracy"),
                    f"{each['without_call']:,}", f"{each['truncated']:,}", f"{each['over_context']:,}",
                    _most_often(each["faults"]),
                )
                for name, each in questions.items()
            ],
        )  # fmt: skip
    for name, each in record.results.items():
        if name in questions:
            continue
        print()
        turns = (("intent", "call_turns"), ("structure", "call_turns"), ("call", "call_turns"),
                 ("rouge1", "text_turns"), ("rougeL", "text_turns"))  # fmt: skip
        print_table(
            (name, "turns", "%", "95 %"),
            [
                (
                    FIGURES_OF_TOOLS[metric],
                    f"{each[count]:,}",
                    _percent(each[metric]),
                    _interval(each, metric),
                )
                for metric, count in turns
                if metric in each
            ],
        )
        print()
        print(
            f"conversations: {each['conversations']:,}; {each['without_call']:,} calls left out, "
            f"{each['needless_calls']:,} where the reference speaks, {each['truncated']:,} answers cut off, "
            f"{each['over_context']:,} over context"
        )


def _figures(record: Record) -> dict[str, str]:
    """Row -> cell: every figure of a record with its interval."""
    from mobilellm.eval.record import FIGURES_OF_TOOLS

    found = {}
    for name, each in record.results.items():
        for metric, title in FIGURES_OF_TOOLS.items():
            if metric in each:
                row = name if metric == "accuracy" else f"{name}: {title}"
                found[row] = f"{_percent(each[metric])} ({_interval(each, metric)})"
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(each: dict[str, Any], metric: str) -> str:
    if f"{metric}_low" not in each:  # of a single conversation
        return "–"
    return f"{100 * each[f'{metric}_low']:.1f}–{100 * each[f'{metric}_high']:.1f}"


def _most_often(faults: dict[str, int]) -> str:
    return ", ".join(f"{fault} {count:,}" for fault, count in list(faults.items())[:2]) or "–"


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    from mobilellm.atomic import atomic_write

    # A model's text may hold half of a surrogate pair, which only an escape can write.
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if path == PRINTED:
        print(text, end="")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
