"""Evaluation records as Markdown tables: a table of each kind, and one of how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mobilellm.eval.published import TASKS
from mobilellm.eval.record import FIGURES_OF_TOOLS, Record
from mobilellm.eval.table import HEADER, METRICS, Row, scores

Named = tuple[str, Record]
"""A record and what to call its model."""


def records_markdown(records: Sequence[Named]) -> str:
    """One table of each kind of record, and one of how, when and where they were made."""
    tables = (
        ("zero-shot", "Zero-shot accuracy, %", ("model", "scoring", *HEADER[1:]), _accuracies),
        ("perplexity", "Perplexity", _PERPLEXITY_HEADER, _perplexities),
        ("tools", "Tool calling, %", _TOOLS_HEADER, _calls),
        ("chat", "Chat", _CHAT_HEADER, _answers),
    )
    parts = []
    for kind, title, header, lines_of in tables:
        if lines := [
            line for name, record in records if record.kind == kind for line in lines_of(name, record)
        ]:
            parts.append(f"## {title}\n\n{markdown_table(header, lines)}")
    if records:
        lines = [_made(name, record) for name, record in records]
        parts.append(f"## How they were made\n\n{markdown_table(_MADE_HEADER, lines)}")
    return "\n".join(parts)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(escaped(cell) for cell in cells)} |\n"

    rule = f"|---|{'---:|' * (len(header) - 1)}\n"
    return line(header) + rule + "".join(map(line, lines))


def escaped(text: str) -> str:
    """As one cell, whatever it holds; leading spaces, which Markdown drops, as a mark."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return f"↳ {plain}" if text.startswith("  ") else plain


def _accuracies(name: str, record: Record) -> list[Row]:
    lines = []
    for metric in METRICS:
        if not any(metric in record.results[task] for task in TASKS if task in record.results):
            continue
        ours = scores(record, metric)
        names = {task: metric if metric in record.results[task] else "acc" for task in ours.percent}
        errors = {task: record.results[task].get(f"{name}_stderr") for task, name in names.items()}
        cells = [
            "-" if task not in ours.percent else f"{ours.percent[task]:.1f}{_error(errors[task])}"
            for task in TASKS
        ]
        lines.append((name, metric, *cells, "-" if ours.average is None else f"{ours.average:.1f}"))
    return lines


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {100 * error:.1f}"


_PERPLEXITY_HEADER: Row = (
    "model", "text", "protocol", "tokens", "token perplexity", "word perplexity", "bits per byte",
)  # fmt: skip


def _perplexities(name: str, record: Record) -> list[Row]:
    return [
        (
            name, text, str(result["protocol"]), f"{result['tokens']:,}",
            _fixed(result["token_perplexity"], 3), _fixed(result["word_perplexity"], 3),
            _fixed(result["bits_per_byte"], 4),
        )
        for text, result in record.results.items()
    ]  # fmt: skip


def _fixed(value: float | None, digits: int) -> str:
    """A text without a word has no perplexity by the word."""
    return "-" if value is None else f"{value:.{digits}f}"


_TOOLS_HEADER: Row = ("model", "asked of", "figure", "asked", "%", "95 % interval")


def _calls(name: str, record: Record) -> list[Row]:
    return [
        (
            name, asked_of, title, f"{_asked(result, metric):,}", f"{100 * result[metric]:.1f}",
            _interval(result, metric, 100, 1),
        )
        for asked_of, result in record.results.items()
        for metric, title in FIGURES_OF_TOOLS.items()
        if metric in result
    ]  # fmt: skip


def _asked(result: dict[str, Any], metric: str) -> int:
    counted = "questions" if metric == "accuracy" else "text_turns" if "rouge" in metric else "call_turns"
    count: int = result[counted]
    return count


_CHAT_HEADER: Row = (
    "model", "conversations of", "conversations", "tokens", "loss a token", "95 % interval", "perplexity",
    "bits a byte", "answered", "stop rate, %", "95 % interval", "tokens an answer", "repetition, %",
)  # fmt: skip


def _answers(name: str, record: Record) -> list[Row]:
    return [
        (
            name, source, f"{result['conversations']:,}", f"{result['tokens']:,}",
            _fixed(result["loss"], 3), _interval(result, "loss", 1, 3),
            _fixed(result["perplexity"], 2), _fixed(result["bits_per_byte"], 3), f"{result['answered']:,}",
            _percent(result.get("stop_rate")), _interval(result, "stop_rate", 100, 1),
            _fixed(result.get("length"), 1), _percent(result.get("repetition")),
        )
        for source, result in record.results.items()
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return _fixed(None if share is None else 100 * share, 1)


def _interval(result: dict[str, Any], metric: str, times: int, digits: int) -> str:
    """Of a single conversation there is none."""
    if f"{metric}_low" not in result:
        return "-"
    low, high = (times * result[f"{metric}_{end}"] for end in ("low", "high"))
    return f"{low:.{digits}f} … {high:.{digits}f}"


_MADE_HEADER: Row = (
    "model", "kind", "parameters", "bytes", "run by", "protocol", "date", "commit", "hardware", "seconds",
    "fingerprint",
)  # fmt: skip


def _made(name: str, record: Record) -> Row:
    model, where = record.model, record.environment
    protocol = ", ".join(f"{key} {value}" for key, value in record.protocol.items() if _is_short(value))
    return (
        name, record.kind, f"{model.parameters:,}", f"{model.bytes:,}",
        f"{model.backend}, {model.dtype}, {model.device}", protocol, str(where.get("date", "-")),
        str(where.get("commit", "-")), f"{where.get('cpu', '-')}, {where.get('cores', '-')} cores",
        f"{record.seconds:,.0f}", model.fingerprint[:16],
    )  # fmt: skip


def _is_short(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 60)
