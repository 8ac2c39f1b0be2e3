"""Write an artefact, compare it with its source, and only then give it its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mobilellm.atomic import (
    atomic_directory,
    atomic_write,
    check_destination,
    check_writable,
    sync,
    take_name,
)
from mobilellm.export.source import Source, open_origin, open_source
from mobilellm.export.targets import (
    Kind,
    Options,
    Target,
    check_options,
    final_name,
    kind_of,
    target_of,
    unverified_name,
)
from mobilellm.export.text import sample_text
from mobilellm.export.verify import Report, Settings, report_path, verify, write_report

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    path: Path
    """Where the artefact lies now: under its name, or under NAME.unverified."""
    notes: list[str]
    report: Report | None
    """None where it was not compared."""


def export(
    source: str | Path,
    out: Path,
    kind: Kind,
    options: Options,
    settings: Settings | None = None,
    compare: bool = True,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Exported:
    """Write `source` to `out`. Until it is compared, and if it fails, the artefact is called OUT.unverified.

    Raises one line for a caller's mistake; whatever happens, nothing half-written is there under either name.
    """
    check_options(kind, options)
    target_of(kind.name)
    check_out(out, kind, overwrite)
    if compare and settings is not None and settings.text is not None:
        sample_text(settings.text)  # a mistake there is told before a large file is written
    return export_source(open_source(source, say), out, kind, options, settings, compare, overwrite, say)


def export_source(
    source: Source,
    out: Path,
    kind: Kind,
    options: Options,
    settings: Settings | None = None,
    compare: bool = True,
    overwrite: bool = False,
    say: Say = lambda line: None,
    origin: Source | None = None,
) -> Exported:
    """As `export`, of a model that is in memory; `out` has been checked.

    `origin` is what a quantised one was made of, where that is in memory, too.
    """
    target = target_of(kind.name)
    options = target.complete(options, source)
    if options.unroll and not source.config.shares_layers:
        raise ValueError(f"unroll = True: {source.name} shares no layers; leave it out")
    texts = target.beside(out.name, source, options)
    for name in texts:
        if (out.parent / name).exists() and not overwrite:
            raise FileExistsError(f"{out.parent / name}: exists; choose another name or pass --overwrite")
    if compare and origin is None:
        origin = open_origin(source, settings.origin if settings else None, say)
    path = unverified_name(out)
    say(f"writing {path}")
    notes = _write(target, source, path, options)
    for name, text in texts.items():
        with atomic_write(out.parent / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        notes.append(f"Beside it: {out.parent / name}")
    report_path(path).unlink(missing_ok=True)  # of what had this name before
    if not compare:
        return Exported(path, notes, None)
    return Exported(*_compared(target, path, source, origin, options, settings, overwrite, say, notes))


def verify_artefact(
    path: Path,
    source: str | Path,
    settings: Settings | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Exported:
    """Compare an artefact that is there. One called NAME.unverified takes its name when it passes.

    The report is written beside it, unless one of another artefact lies there.
    """
    kind = kind_of(path)
    target = target_of(kind.name)
    if path != final_name(path):
        check_out(final_name(path), kind, overwrite)
    opened = open_source(source, say)
    origin = open_origin(opened, settings.origin if settings else None, say)
    return Exported(*_compared(target, path, opened, origin, None, settings, overwrite, say, []))


def check_out(out: Path, kind: Kind, overwrite: bool) -> None:
    """Raises FileExistsError and its like for a name that cannot be taken."""
    if kind.suffix:
        if out.suffix != kind.suffix:
            raise ValueError(f"{out}: the name of the file must end in {kind.suffix}")
        if out.is_dir():
            raise IsADirectoryError(f"{out}: is a directory; name a file")
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out}: exists; choose another name or pass --overwrite")
        check_writable(out)
    else:
        check_destination(out, overwrite, kind.objection)


def _write(target: Target, source: Source, path: Path, options: Options) -> list[str]:
    if target.kind.suffix:
        with atomic_write(path) as temporary:
            return target.write(source, temporary, options)
    with atomic_directory(path, True, target.kind.objection) as temporary:
        return target.write(source, temporary, options)


def _compared(
    target: Target,
    path: Path,
    source: Source,
    origin: Source | None,
    options: Options | None,
    settings: Settings | None,
    overwrite: bool,
    say: Say,
    notes: list[str],
) -> tuple[Path, list[str], Report]:
    report = verify(target, path, source, options, settings, say, origin)
    named = final_name(path)
    if "report" in report.failed:
        return path, notes, report
    write_report(report, named if report.passed else path)
    if not report.passed or named == path:
        return path, notes, report
    if target.kind.suffix:  # the report first: an artefact under its name always has one
        os.replace(path, named)
        sync(named.resolve().parent)
    else:
        take_name(path, named, overwrite, target.kind.objection)
    report_path(path).unlink(missing_ok=True)
    return named, notes, report
