"""Where an evaluation of several models writes what it has of each; `-` is standard output, for all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm.atomic import check_writable

if TYPE_CHECKING:
    from mobilellm.eval.record import Record

PRINTED = Path("-")
"""Named as the file: the object is printed in place of the table."""


def file_names(verb: str, models: Sequence[str], outputs: Sequence[Path | None]) -> list[str]:
    """A file name for every model, without ending.

    Raises ValueError for no model or one named twice, FileExistsError for several models and an output that
    is a file.
    """
    if not models:
        raise ValueError(f"{verb}: no model is named; name at least one")
    names = [re.sub(r"[^\w.-]+", "_", model).strip("._-") or "model" for model in models]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{verb}: two models would be written as {name!r}; name each once")
    for path in outputs:
        if path is not None and len(names) > 1 and path.is_file():
            raise FileExistsError(f"{path}: is a file; for several models name a folder")
        check_output(path)
    return names


def check_output(path: Path | None, check: Callable[[Path], None] = check_writable) -> None:
    """Raise OSError for what could not be written: scoring takes longer than seeing that.

    `check` is `check_file_writable` for what has to be a file, not a folder for files.
    """
    if path not in (None, PRINTED):
        check(path)


def is_printed(**outputs: Path | None) -> bool:
    """Whether one of these outputs takes standard output, in place of the table.

    Raises ValueError for two that would.
    """
    printed = [f"--{name} -" for name, path in outputs.items() if path == PRINTED]
    if len(printed) > 1:
        raise ValueError(f"{' and '.join(printed)}: only one can be printed; name a file for the other")
    return bool(printed)


def output_file(path: Path, name: str, ending: str, models: int) -> Path:
    """`path` itself for one model, a file in it for several, or where it is a folder."""
    return path / f"{name}{ending}" if models > 1 or path.is_dir() else path


def keep_record(record: Record, path: Path | None, name: str, models: int) -> None:
    """In its file, where there is one."""
    from mobilellm.eval.record import save

    if path not in (None, PRINTED):
        save(record, output_file(path, name, ".json", models))


def print_records(records: Sequence[Record]) -> None:
    """One JSON object: the record, or of several models all under "records"."""
    from mobilellm.eval.record import to_json

    values = [to_json(record) for record in records]
    print(json.dumps(values[0] if len(values) == 1 else {"records": values}))
