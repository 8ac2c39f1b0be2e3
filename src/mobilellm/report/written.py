"""A report on one run or several: pictures, one page, and the numbers as JSON, in one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm import __version__
from mobilellm.report.durations import duration
from mobilellm.report.history import History, Summary, differences, read_history, summarise
from mobilellm.report.page import Name, Picture, report_page
from mobilellm.report.panels import PANEL_NAMES, Panel, panels
from mobilellm.report.plots import DARK, LIGHT, SMALL, WIDE, draw, short_count, stroke
from mobilellm.report.report_folder import ReportFolder

FORMAT = "mobilellm-report-1"
PAGE, NUMBERS = "report.html", "report.json"
_MOST_SAMPLES = 5
"""Moments of a run whose samples are shown, the last one first."""

NOTES = (
    "Train loss: mean of the last 50 steps. Held-out: the last evaluation. Perplexity is per token: compare "
    "it between runs of one tokenizer only; bits per byte compares all.",
    "Tokens/s: median over the steps, all devices together. MFU: median share of the devices' dense "
    "bf16 peak, counting 6N and causal attention: N is every executed weight, head included, backward costs "
    "two forwards, what is recomputed does not count. 6N MFU leaves attention out.",
    "Time in steps leaves out evaluations, checkpoints and pauses.",
)


def read_runs(directories: Sequence[Path]) -> list[History]:
    """Their histories. Raises ValueError for the same folder named twice, and as `read_history`."""
    seen = set[Path]()
    for directory in directories:
        if directory.resolve() in seen:
            raise ValueError(f"{directory}: named twice; name each run once")
        seen.add(directory.resolve())
    return [read_history(directory) for directory in directories]


def run_labels(histories: Sequence[History]) -> list[str]:
    """What to call each run: its name, or its folder where two have one name."""
    names = [history.name for history in histories]
    return [
        name if names.count(name) == 1 else str(history.directory)
        for name, history in zip(names, histories, strict=True)
    ]


def report_json(histories: Sequence[History]) -> dict[str, Any]:
    """Everything the report says in numbers; what is not finite is null, as JSON has no name for it."""
    return {
        "runs": [_plain(asdict(summarise(history))) for history in histories],
        "differences": _plain(differences(histories)),
        "conventions": list(NOTES),
    }


def write_report(histories: Sequence[History], out: Path) -> list[Path]:
    """Write pictures, page and numbers into `out`; the files written, the page first.

    Raises FileExistsError for a file of one of these names that no report made, NotADirectoryError where
    `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; choose another --out")
    labels = run_labels(histories)
    drawn = panels(histories, labels)
    folder = ReportFolder(out, FORMAT, NUMBERS, _is_ours)
    names = [PAGE, *(f"{panel.name}.png" for panel in drawn), NUMBERS]
    folder.check(names)  # drawing takes longer
    pictures = {f"{panel.name}.png": draw(panel) for panel in drawn}
    page = _page(histories, labels, drawn, pictures)
    return folder.write(names, {**pictures, PAGE: page.encode()}, report_json(histories))


def number_rows(histories: Sequence[History], labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The numbers as a table, a column a run, its header first. Rows that no run has are left out."""
    summaries = [summarise(history) for history in histories]
    rows: dict[str, list[str]] = {
        "parameters": [_count(each.parameters) for each in summaries],
        "device": [_device(each) for each in summaries],
        "steps": [_steps(each) for each in summaries],
        "tokens": [short_count(each.tokens) for each in summaries],
        "train loss": [_fixed(each.train_loss, 4) for each in summaries],
    }
    for name in dict.fromkeys(key for each in summaries for key in each.held_out_last or {} if key != "step"):
        rows[f"held-out {_words(name)}"] = [_held_out(each.held_out_last, name) for each in summaries]
    rows["held-out loss at its best"] = [_best(each) for each in summaries]
    rows |= {
        "tokens/s": [_count(each.tokens_per_second) for each in summaries],
        "MFU (6N + attention)": [_percent(each.mfu) for each in summaries],
        "6N MFU": [_percent(each.mfu_6n) for each in summaries],
        "waiting for data": [_percent(each.data_wait_share, 2) for each in summaries],
        "peak memory a device": [_gigabytes(each.peak_memory_bytes) for each in summaries],
        "time in steps": [duration(each.step_seconds) for each in summaries],
    }
    kept = [(name, *values) for name, values in rows.items() if any(value != "-" for value in values)]
    return [("", *labels), *kept]


def difference_rows(histories: Sequence[History], labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Recipe fields that differ, a column a run, the header first; [] when none does."""
    found = differences(histories)
    return (
        [("", *labels), *((name, *map(field_text, values)) for name, values in found.items())]
        if found
        else []
    )


def field_text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _page(
    histories: Sequence[History], labels: Sequence[str], drawn: Sequence[Panel], light: Mapping[str, bytes]
) -> str:
    pictures, alone = list[Picture](), len(histories) == 1
    for index, panel in enumerate(drawn):
        words = f"{panel.title} over tokens, of {', '.join(labels)}"
        if index == 0:
            narrow = tuple(draw(panel, theme, SMALL, with_names=alone) for theme in (LIGHT, DARK))
            wide = (light[f"{panel.name}.png"], draw(panel, DARK, WIDE))
            pictures.append(Picture(panel.title, panel.caption, words, *wide, *narrow))
        else:
            both = tuple(draw(panel, theme, SMALL, with_names=alone) for theme in (LIGHT, DARK))
            pictures.append(Picture(panel.title, panel.caption, words, *both))
    recipe: tuple[str, list[tuple[str, ...]]]
    if alone:
        fields = [(name, field_text(value)) for name, value in histories[0].recipe.items()]
        recipe = ("Recipe", [("", ""), *fields] if fields else [])
    else:
        recipe = ("Recipe, where it differs", difference_rows(histories, labels))
    return report_page(
        title=labels[0] if alone else f"{len(histories)} runs compared",
        lead=_lead(histories[0]) if alone else "",
        names=[] if alone else [Name(label, *stroke(run)) for run, label in enumerate(labels)],
        pictures=pictures,
        numbers=number_rows(histories, labels),
        notes=[*NOTES, f"Made by mobilellm {__version__} from metrics.jsonl."],
        recipe=recipe,
        samples=_samples(histories, labels),
    )


def _lead(history: History) -> str:
    summary = summarise(history)
    parts = []
    if summary.parameters:
        parts.append(f"{summary.parameters / 1e6:,.1f}M parameters")
    if summary.hardware:
        parts.append(_device(summary))
    done = f"step {summary.steps:,}"
    if summary.planned_steps:
        done += f" of {summary.planned_steps:,} ({summary.steps / summary.planned_steps:.0%})"
    parts.append(done)
    if started := history.facts.get("started"):
        parts.append(f"started {started[:10]}")
    return " · ".join(parts)


def _samples(
    histories: Sequence[History], labels: Sequence[str]
) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    """Of one run some moments, the last first; of several the last of each."""
    if len(histories) > 1:
        return [
            (f"{label}, step {history.samples[-1].step:,}", history.samples[-1].texts)
            for label, history in zip(labels, histories, strict=True)
            if history.samples
        ]
    samples = histories[0].samples
    last = len(samples) - 1
    chosen = sorted({round(last * part / (_MOST_SAMPLES - 1)) for part in range(_MOST_SAMPLES)}, reverse=True)
    return [(f"Step {samples[index].step:,}", samples[index].texts) for index in chosen if samples]


def _is_ours(name: str) -> bool:
    return name in (PAGE, NUMBERS, *(f"{panel}.png" for panel in PANEL_NAMES))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _words(name: str) -> str:
    """Of an evaluation's number: "books/bits_per_byte" is "bits per byte (books)"."""
    group, _, number = name.rpartition("/")
    return number.replace("_", " ") + (f" ({group})" if group else "")


def _held_out(numbers: Mapping[str, float] | None, name: str) -> str:
    digits = 2 if name.endswith("perplexity") else 4
    return "-" if numbers is None or name not in numbers else _fixed(numbers[name], digits)


def _best(summary: Summary) -> str:
    best = summary.held_out_best
    return "-" if best is None else f"{best['loss']:.4f} (step {int(best['step']):,})"


def _device(summary: Summary) -> str:
    return ", then ".join(summary.hardware) or "-"


def _steps(summary: Summary) -> str:
    of = f" of {summary.planned_steps:,}" if summary.planned_steps not in (None, summary.steps) else ""
    return f"{summary.steps:,}{of}"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _fixed(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:,.{digits}f}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"
