"""Perplexity of a text: per token, per word, and bits per byte, by a protocol that is named beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.atomic import check_file_writable
from mobilellm.cli.eval_model import ModelOptions, scored_model
from mobilellm.cli.eval_outputs import PRINTED, check_output, print_records
from mobilellm.cli.tables import print_notes, print_sheet
from mobilellm.eval.record import Record, save
from mobilellm.eval.text_perplexity import PerplexitySettings, evaluate_perplexity
from mobilellm.eval.texts import WIKITEXT2


@dataclass(frozen=True)
class Ppl:
    """Perplexity of texts: per token, per word, and bits per byte."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, or Hub id (org/name)."""
    data: tuple[str, ...] = (WIKITEXT2,)
    """Text files, or wikitext2 for the raw test split from the Hub. Each is measured by itself."""
    settings: Annotated[PerplexitySettings, tyro.conf.arg(name="")] = field(
        default_factory=PerplexitySettings
    )
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    json: Path | None = None
    """Write the record here: numbers, windows one by one, protocol, machine; - prints it in place of the
    table."""


def run_ppl(arguments: Ppl) -> None:
    check_output(arguments.json, check_file_writable)
    with scored_model(arguments.model, arguments.options, "tokens") as scored:
        record = evaluate_perplexity(
            scored.model, arguments.data, arguments.settings, scored.progress, scored.counts
        )
    if arguments.json == PRINTED:
        print_records([record])
        return
    if arguments.json is not None:
        save(record, arguments.json)
    _print(record)
    if arguments.json is not None:
        print_notes([f"Record: {arguments.json}"])


def _print(record: Record) -> None:
    protocol = record.protocol
    described = f"{protocol['name']}, window {protocol['window']:,}"
    if "stride" in protocol:
        described += f", stride {protocol['stride']:,}"
    if protocol.get("rows") == "as-is":
        described += ", text as it is"
    for number, (name, numbers) in enumerate(record.results.items()):
        if number:
            print()
        rows: Sequence[tuple[str, str]] = [
            (
                "model",
                f"{record.model.name} ({record.model.backend}, {record.model.dtype}, {record.model.device})",
            ),
            ("text", name),
            ("protocol", described),
            ("perplexity per token", f"{numbers['token_perplexity']:.4f}"),
            ("perplexity per word", _shown(numbers["word_perplexity"])),
            ("bits per byte", _shown(numbers["bits_per_byte"])),
            (
                "predicted",
                f"{numbers['tokens']:,} tokens, {numbers['words']:,} words, {numbers['bytes']:,} bytes in "
                f"{numbers['units']:,} {'documents' if protocol['name'] == 'document' else 'windows'}",
            ),
            ("time", f"{record.seconds:.1f} s ({record.scored:,} scored, {record.cached:,} from the cache)"),
        ]
        print_sheet(rows)
    notes = ["Compare with numbers of the same protocol and window only."]
    if protocol["name"] == "reference" and protocol["window"] != 2048:
        notes.append(
            f"The published protocol's windows are of 2,048 tokens, these of {protocol['window']:,}, which "
            "raises perplexity."
        )
    print_notes(notes)


def _shown(number: float | None) -> str:
    return "none" if number is None else f"{number:.4f}"
