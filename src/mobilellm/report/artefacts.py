"""One model in all its formats: a table as Markdown and JSON, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobilellm.report.report_folder import ReportFolder
from mobilellm.report.speed import Bar, Panel, speed_picture

FORMAT = "mobilellm-artefacts-report-1"
PAGE, NUMBERS, PICTURE = "artefacts.md", "artefacts.json", "artefacts.png"
HEADER = (
    "artefact", "kind", "stored as", "rounded by", "MB", "bits a weight", "perplexity", "KL, nats",
    "eight tasks, %", "tokens/s", "first token, s", "peak memory, MB", "runtime",
)  # fmt: skip
_ABSENT = "–"


@dataclass(frozen=True)
class ArtefactRow:
    """An artefact: what its verify report tells, and what was measured here (None: it was not)."""

    name: str
    kind: str
    stored_as: str
    quantized_by: str | None
    """rtn or gptq; None: not at all, or it is not told."""
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float | None
    """From the source, nats a token; None where it was compared only with what was quantised from that."""
    accuracy: float | None
    """Average of the eight tasks, 0 … 1."""
    tokens_per_second: float | None
    first_token_seconds: float | None
    peak_bytes: int | None
    runtime: str


def cells(row: ArtefactRow) -> tuple[str, ...]:
    """As they stand below HEADER."""

    def shown(value: float | None, text: Callable[[float], str]) -> str:
        return _ABSENT if value is None else text(value)

    return (
        row.name,
        row.kind,
        row.stored_as,
        row.quantized_by or _ABSENT,
        f"{row.bytes / 1e6:.1f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.perplexity:.4g}",
        shown(row.kl, lambda value: f"{value:.2g}"),
        shown(row.accuracy, lambda value: f"{100 * value:.1f}"),
        shown(row.tokens_per_second, lambda value: f"{value:.1f}"),
        shown(row.first_token_seconds, lambda value: f"{value:.2f}"),
        shown(row.peak_bytes, lambda value: f"{value / 1e6:.0f}"),
        row.runtime,
    )


def markdown(rows: Sequence[ArtefactRow], notes: Sequence[str]) -> str:
    lines = [HEADER, tuple("---" if index < 4 else "--:" for index in range(len(HEADER)))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *map(cells, rows)])
    return "\n\n".join(["# One model in its formats", table, f"![bars]({PICTURE})", *notes]) + "\n"


def picture(rows: Sequence[ArtefactRow], title: str) -> bytes:
    """Bars as PNG: size, perplexity, and what was measured, an artefact a group and a kind a colour."""
    told: list[tuple[str, str, Callable[[ArtefactRow], float | None]]] = [
        ("Size", "MB", lambda row: row.bytes / 1e6),
        ("Perplexity", "lower is better", lambda row: row.perplexity),
        ("Average of eight tasks", "%", lambda row: None if row.accuracy is None else 100 * row.accuracy),
        ("Decoding", "tokens a second", lambda row: row.tokens_per_second),
        ("From nothing to the first token", "seconds", lambda row: row.first_token_seconds),
        ("Peak memory", "MB", lambda row: None if row.peak_bytes is None else row.peak_bytes / 1e6),
    ]
    panels = []
    for name, unit, value in told:
        bars = [
            Bar(row.name, row.kind, found, f"{found:.4g}")
            for row in rows
            if (found := value(row)) is not None
        ]
        if bars:
            panels.append(Panel(name, unit, bars))
    return speed_picture(panels, title)


def write_report(
    rows: Sequence[ArtefactRow], notes: Sequence[str], about: dict[str, Any], out: Path
) -> list[Path]:
    """Page, numbers and picture into `out`. Raises FileExistsError for a file there no report made."""
    names = (PAGE, NUMBERS, PICTURE)
    folder = ReportFolder(out, FORMAT, NUMBERS, lambda name: name in names)
    contents = {PAGE: markdown(rows, notes).encode(), PICTURE: picture(rows, about["environment"]["cpu"])}
    return folder.write(names, contents, numbers(rows, notes, about))


def numbers(rows: Sequence[ArtefactRow], notes: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "artefacts": [asdict(row) for row in rows], "notes": list(notes)}
