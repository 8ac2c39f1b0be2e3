"""Evaluations in writing: tables as Markdown, and a folder of them with their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm import __version__
from mobilellm.eval.compare import AVERAGE, Comparison, Difference, Ratio
from mobilellm.eval.published import TASKS, TITLES
from mobilellm.eval.table import HEADER, METRICS, Entry, Measured, Row, by_table, rows
from mobilellm.report.evaluation import accuracy_picture, difference_picture, perplexity_picture
from mobilellm.report.records_written import Named, escaped, markdown_table, records_markdown
from mobilellm.report.report_folder import ReportFolder

FORMAT = "mobilellm-evaluation-report-1"
PAGE, NUMBERS = "evaluation.md", "evaluation.json"

TABLE_NOTES = (
    "Published: what the model card prints, in the order its values are really in; the Hub stands "
    "them under another header. Its own pipeline was never published, so ours need not equal it.",
    "Ours, in percent, by {metric}.",
)
COMPARISON_NOTES = (
    "Paired: both models on the same documents. Difference is the second minus the first; won and lost count "
    "the documents only one of them has right.",
    "Intervals: 95 %, percentile bootstrap over the documents of each task, {samples:,} resamples, seed "
    "{seed}; the average is over tasks, each counting the same. p: McNemar's exact test, of the average the "
    "bootstrap's. Neither knows how another training run would have come out.",
)
PERPLEXITY_NOTES = (
    "Paired: both models on the same windows or documents of the same text, by the same protocol. Below 1 "
    "(below 0 bits per byte) the second is better; won counts the windows it predicts better.",
    "Intervals: 95 %, percentile bootstrap over windows or documents, {samples:,} resamples, seed {seed}. "
    "Neighbouring windows of one article are alike, so that the true intervals are somewhat wider.",
)
TOOL_NOTES = (
    "Paired: both models on the same questions and turns. Difference is the second minus the first; won and "
    "lost count those where only one of them is right, or is better.",
    "Intervals: 95 %, percentile bootstrap over questions or, their turns being alike, conversations, "
    "{samples:,} resamples, seed {seed}. p: McNemar's exact test of questions, else the bootstrap's. Neither "
    "knows how another training run would have come out.",
)
CHAT_NOTES = (
    "Paired: the loss of both models on what the assistant says in the same conversations. Below 1 (below 0 "
    "bits per byte) the second is better; won counts the conversations it predicts better.",
    "Intervals: 95 %, percentile bootstrap over conversations, {samples:,} resamples, seed {seed}.",
)
_NOTES = {
    "zero-shot": COMPARISON_NOTES, "tools": TOOL_NOTES, "perplexity": PERPLEXITY_NOTES, "chat": CHAT_NOTES,
}  # fmt: skip


def table_markdown(found: Sequence[Entry], metric: str) -> str:
    """The card's tables, published beside measured."""
    header = ("system", *HEADER[1:])
    parts = [f"## {title}\n\n{markdown_table(header, rows(held, metric))}" for title, held in by_table(found)]
    return "\n".join([*parts, *(f"{note}\n" for note in table_notes(metric))])


def table_notes(metric: str) -> list[str]:
    return [note.format(metric=METRICS[metric]) for note in TABLE_NOTES]


def comparison_rows(comparison: Comparison) -> list[Row]:
    """Its header and lines."""
    if comparison.kind in ("zero-shot", "tools"):
        header: Row = (
            "",
            "first, %",
            "second, %",
            "difference",
            "95 % interval",
            "won",
            "lost",
            "documents" if comparison.kind == "zero-shot" else "asked",
            "p",
        )
        return [header, *(_difference_row(row) for row in comparison.rows if isinstance(row, Difference))]
    header = (
        "", "first,\nbits/byte", "second,\nbits/byte", "difference", "95 % interval", "perplexity\nratio",
        "95 % interval", "won", "lost", "conversations" if comparison.kind == "chat" else "windows", "p",
    )  # fmt: skip
    return [header, *(_ratio_row(row) for row in comparison.rows if isinstance(row, Ratio))]


def comparison_notes(comparison: Comparison) -> list[str]:
    notes = _NOTES[comparison.kind]
    return [note.format(samples=comparison.samples, seed=comparison.seed) for note in notes]


def write_table(
    out: Path, found: Sequence[Entry], metric: str, texts: Sequence[Named], numbers: Mapping[str, Any]
) -> list[Path]:
    """The card's tables with their pictures in a folder; the files written, the page first.

    `texts` are perplexity records of the same models. Raises FileExistsError for a file of one of these names
    that no report made.
    """
    measured: list[Measured] = [each for entry in found for each in entry.measured]
    pictures = {"accuracy.png": accuracy_picture(measured, metric)}
    for text, group in _comparable(texts):
        name = f"perplexity-{len(pictures)}.png"
        pictures[name] = perplexity_picture(group, text)
    records = [(each.name, each.record) for each in measured] + list(texts)
    body = "\n".join([table_markdown(found, metric), records_markdown(records)])
    return _write(out, "Zero-shot accuracy, published and measured", body, pictures, numbers)


def write_comparisons(
    out: Path, comparisons: Sequence[Comparison], records: Sequence[Named], numbers: Mapping[str, Any]
) -> list[Path]:
    """Comparisons with their picture in a folder; files and errors as `write_table`."""
    parts = []
    for each in comparisons:
        header, *lines = comparison_rows(each)
        metric = f", {each.metric}" if each.metric else ""
        parts.append(
            f"## {escaped(each.b)} against {escaped(each.a)}{metric}\n\n{markdown_table(header, lines)}"
        )
    parts += [f"{note}\n" for note in comparison_notes(comparisons[0])]
    body = "\n".join([*parts, records_markdown(records)])
    return _write(
        out, "Evaluations compared", body, {"difference.png": difference_picture(comparisons)}, numbers
    )


def _write(
    out: Path, title: str, body: str, pictures: Mapping[str, bytes], numbers: Mapping[str, Any]
) -> list[Path]:
    shown = "".join(f"![{name.removesuffix('.png')}]({name})\n\n" for name in pictures)
    page = f"# {title}\n\n{shown}{body}\nMade by mobilellm {__version__}.\n"
    folder = ReportFolder(out, FORMAT, NUMBERS, _is_ours)
    return folder.write([PAGE, *pictures, NUMBERS], {**pictures, PAGE: page.encode()}, numbers)


def _is_ours(name: str) -> bool:
    return name in (PAGE, NUMBERS) or _is_picture(name)


def _is_picture(name: str) -> bool:
    stem = name.removesuffix(".png")
    return name != stem and (stem in ("accuracy", "difference") or stem.rstrip("0123456789") == "perplexity-")


def _comparable(texts: Sequence[Named]) -> list[tuple[str, list[Named]]]:
    """Perplexity records by text and protocol: (text, those that can share a picture)."""
    groups: dict[tuple[str, str, str], list[Named]] = {}
    for name, record in texts:
        for text, result in record.results.items():
            groups.setdefault((text, result["protocol"], result["text_sha256"]), []).append((name, record))
    return [(text, held) for (text, _, _), held in groups.items()]


def _difference_row(row: Difference) -> Row:
    name = row.name if row.name == AVERAGE else _TITLE.get(row.name, row.name)
    return (
        name, f"{100 * row.a:.1f}", f"{100 * row.b:.1f}", f"{100 * row.difference:+.1f}",
        f"{100 * row.low:+.1f} … {100 * row.high:+.1f}", f"{row.won:,}", f"{row.lost:,}",
        f"{row.documents:,}", _p(row.p),
    )  # fmt: skip


def _ratio_row(row: Ratio) -> Row:
    return (
        f"{row.name} ({row.protocol})", f"{row.a:.4f}", f"{row.b:.4f}", f"{row.difference:+.4f}",
        f"{row.low:+.4f} … {row.high:+.4f}", f"{row.perplexity_ratio:.4f} a {row.per}",
        f"{row.perplexity_low:.4f} … {row.perplexity_high:.4f}", f"{row.won:,}", f"{row.lost:,}",
        f"{row.windows:,}", _p(row.p),
    )  # fmt: skip


_TITLE = dict(zip(TASKS, TITLES, strict=True))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
