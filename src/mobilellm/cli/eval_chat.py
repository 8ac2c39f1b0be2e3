"""`mobilellm eval chat`: how well models answer, and whether they end by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.atomic import atomic_write, check_file_writable
from mobilellm.cli.eval_model import ModelOptions, scored_model
from mobilellm.cli.eval_outputs import (
    PRINTED,
    check_output,
    file_names,
    is_printed,
    keep_record,
    print_records,
)

if TYPE_CHECKING:
    from mobilellm.eval.chat import ChatEvaluation


@dataclass(frozen=True)
class Chat:
    """Instruction following: held-out loss on what the assistant says, stop rate, length, repetition.

    Answers are greedy and kept as they come: after Ctrl-C the same command goes on. With --sheet the answers
    of all models to the same prompts stand side by side on one page.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model directories, training runs, .gguf files, directories of exports, or Hub ids (org/name)."""
    data: Path | None = None
    """A file of conversations, in any shape that finetune reads."""
    held_out: float | None = None
    """Only the share of it that finetune held out (0.05 unless it was told another)."""
    limit: int | None = None
    """Only so many conversations, the first ones."""
    answered: int = 100
    """How many of them are answered, the first ones; the loss is of all."""
    max_tokens: int = 256
    """Longest answer."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """Write a record: a file, or for several models a folder with one file each; - prints them in place of
    the table."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="OUT.html")] = None
    """Write a page with prompts and every model's answers, to be read by people; - prints it in place of the
    table."""
    sheet_prompts: int = 20
    """How many prompts it shows."""
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def run_chat(arguments: Chat) -> None:
    names = file_names("eval chat", arguments.models, (arguments.json,))
    check_output(arguments.sheet, check_file_writable)
    printed = is_printed(json=arguments.json, sheet=arguments.sheet)
    if arguments.data is None:
        raise ValueError("eval chat: --data names no file of conversations")
    if arguments.sheet_prompts < 1:
        raise ValueError(f"sheet_prompts = {arguments.sheet_prompts} must be at least 1")
    from mobilellm.cli.tables import print_notes
    from mobilellm.eval.chat import evaluate_chat
    from mobilellm.eval.conversations import read_conversations

    conversations = read_conversations(arguments.data, arguments.held_out, arguments.limit)
    found: list[ChatEvaluation] = []
    try:
        for source, name in zip(arguments.models, names, strict=True):
            with scored_model(source, arguments.options, "conversations") as opened:
                each = evaluate_chat(
                    opened.model, conversations, arguments.answered, arguments.max_tokens,
                    opened.progress, opened.counts,
                )  # fmt: skip
            found.append(each)
            keep_record(each.record, arguments.json, name, len(names))
    finally:  # what is finished is shown, whatever became of the rest
        if found and not printed:
            print_chat(found)
        if found and arguments.sheet:
            _write_sheet(arguments.sheet, found, arguments.sheet_prompts)
    if arguments.json == PRINTED:
        print_records([each.record for each in found])
    elif arguments.sheet and not printed:
        print_notes([f"Written: {arguments.sheet}"])


def print_chat(found: Sequence[ChatEvaluation]) -> None:
    """A column for each model."""
    from mobilellm.cli.tables import print_notes, print_table

    records = [each.record for each in found]
    columns = [_column(next(iter(record.results.values()))) for record in records]
    (name,) = records[0].results
    print_table(
        (name, *(record.model.name for record in records)),
        [(row, *(column[row] for column in columns)) for row in columns[0]],
    )
    notes = dict.fromkeys(note for record in records for note in record.protocol["notes"])
    if any("loss_low" not in result for record in records for result in record.results.values()):
        notes["a single conversation tells nothing of how sure its loss is: no interval"] = None
    print_notes([*notes, "in brackets: 95 % intervals. Compare losses of one tokenizer and template only."])


def _column(result: dict[str, Any]) -> dict[str, str]:
    rows = {
        "conversations": f"{result['conversations']:,}",
        "over context": f"{result['over_context']:,}",
        "assistant's tokens": f"{result['tokens']:,}",
        "loss a token": f"{result['loss']:.3f} ({_loss_interval(result)})",
        "perplexity": f"{result['perplexity']:.2f}",
        "bits a byte": "–" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.3f}",
        "answered": f"{result['answered']:,}",
        "stop rate, %": "–", "tokens an answer": "–",
        "tokens a reference": f"{result['reference_length']:.1f}",
        "repetition, %": "–", "empty answers": "–",
    }  # fmt: skip
    if "stop_rate" in result:
        low, high = (100 * result[f"stop_rate_{end}"] for end in ("low", "high"))
        rows |= {
            "stop rate, %": f"{100 * result['stop_rate']:.1f} ({low:.1f}–{high:.1f})",
            "tokens an answer": f"{result['length']:.1f}",
            "repetition, %": f"{100 * result['repetition']:.1f}",
            "empty answers": f"{result['empty']:,}",
        }
    return rows


def _loss_interval(result: dict[str, Any]) -> str:
    return f"{result['loss_low']:.3f}–{result['loss_high']:.3f}" if "loss_low" in result else "–"


def _write_sheet(path: Path, found: Sequence[ChatEvaluation], prompts: int) -> None:
    from mobilellm.report.sample_sheet import Column, sample_sheet

    columns = [Column(each.record.model.name, each.answered[:prompts]) for each in found]
    (name,) = found[0].record.results
    # A model may have said half of a surrogate pair.
    page = sample_sheet(name, columns).encode(errors="replace").decode()
    if path == PRINTED:
        print(page, end="")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
