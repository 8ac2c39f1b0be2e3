"""What `export` and `verify` share: flags of the comparison, and what they print of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.cli.notices import say
from mobilellm.cli.tables import print_notes, print_sheet, print_worded_table
from mobilellm.export.targets import unverified_name

if TYPE_CHECKING:
    from mobilellm.export.check import Check
    from mobilellm.export.export import Exported
    from mobilellm.export.targets import Kind
    from mobilellm.export.verify import Report, Settings


@dataclass(frozen=True)
class Comparison:
    text: Path | None = None
    """Text file to compare on; by default the documentation that every Python carries."""
    tokens: int | None = None
    """Tokens of it whose logits are compared (default 512)."""
    runtime: str | None = None
    """What runs it, e.g. engine or llama.cpp; by default all that can and are installed."""
    origin: str | None = None
    """Of a quantised MODEL what it was made of, to measure the distance from that, too; by default what it
    names itself, if that is still there."""

    def settings(self) -> Settings:
        from mobilellm.export.verify import TOKENS, Settings

        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens = {self.tokens} must be at least 1")
        return Settings(self.text, self.tokens or TOKENS, self.runtime, self.origin)


@contextlib.contextmanager
def unverified_told(out: Path, mend: str) -> Iterator[None]:
    """Where what ends here, Ctrl-C or not, leaves `out` written and not compared, say so, and the mend."""
    path = unverified_name(out)
    before = _identity(path)
    try:
        yield
    except BaseException:
        if _identity(path) not in (None, before):
            say(f"{path} is whole, but was not compared with its source; {mend}")
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    """By which what replaced something is told from it."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def show(exported: Exported, kind: Kind, as_json: bool) -> None:
    """Print it, and exit with 1 if a check has failed."""
    if as_json:
        print(json.dumps(_described(exported, kind)))
    else:
        _print(exported, kind)
    if exported.report is not None and not exported.report.passed:
        sys.exit(1)


def _described(exported: Exported, kind: Kind) -> dict[str, Any]:
    report = exported.report
    return {
        "artefact": str(exported.path),
        "kind": kind.name,
        "bytes": bytes_on_disk(exported.path),
        "notes": exported.notes,
        "verified": report is not None and report.passed,
        "report": report.to_dict() if report else None,
    }


def _print(exported: Exported, kind: Kind) -> None:
    from mobilellm.export.verify import report_path

    report = exported.report
    rows = [("artefact", f"{exported.path}, {bytes_on_disk(exported.path):,} B"), ("kind", kind.name)]
    if report is not None:
        rows += _rows(report)
    print_sheet(rows)
    if report is not None:
        print()
        header = ("check", "found", "at most", "", "what was compared")
        print_worded_table(header, [_check_row(check) for check in report.checks])
    notes = list(exported.notes)
    if report is None:
        notes.append(f"Not compared with its source: mobilellm verify {exported.path} --against MODEL")
    elif report.passed:
        notes.append(f"Verified. Report: {report_path(exported.path)}")
    else:
        notes.append(f"Not verified: {', '.join(report.failed)}. What was compared is no copy of its source.")
    print_notes(notes)


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("bits a weight", f"{report.bits_per_weight:.2f}"),
        ("run by", ", ".join(report.runtimes.values()) or "nothing"),
    ]
    if report.origin_sha256 != report.source_sha256:
        rows.append(("rounded by", f"{report.quantized_by}, from the model {report.origin_sha256[:12]}…"))
    for runtime, measured in report.fidelity.items():
        within = f" in {runtime}" if len(report.fidelity) > 1 else ""
        rows.append(
            (
                f"perplexity{within}",
                f"{measured.perplexity:.4g} on the {report.text['name']}, of the source "
                f"{measured.source_perplexity:.4g}; the same next token {measured.agreement:.1%} of the time",
            )
        )
        if measured.origin_kl is not None:
            of_both = f"{measured.origin_kl:.2g} nats a token, from what was quantised {measured.kl:.2g}"
            rows.append((f"KL from the origin{within}", of_both))
    return rows


def _check_row(check: Check) -> tuple[str, str, str, str, str]:
    figure = "-" if check.figure is None else f"{check.figure:.3g}"
    verdict = "passed" if check.passed else "FAILED"
    return check.name, figure, f"{check.bar:.3g} {check.unit}", verdict, check.detail
