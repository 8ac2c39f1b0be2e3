"""A folder with a report in it: a page, pictures, and a JSON file that lists them all.

The list is how the next report knows which files it may replace; others are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write


@dataclass(frozen=True)
class ReportFolder:
    """`format` tells one kind of report from another; `is_ours` which names one can have made."""

    out: Path
    format: str
    numbers: str
    """Name of the JSON file."""
    is_ours: Callable[[str], bool]

    def check(self, names: Sequence[str]) -> None:
        """Raise FileExistsError for a file of one of these names that no report made."""
        made = self._made_before()
        for name in names:
            if name not in made and os.path.lexists(self.out / name):
                raise FileExistsError(
                    f"{self.out / name}: is there and no report made it; choose another --out"
                )

    def write(
        self, names: Sequence[str], contents: Mapping[str, bytes], numbers: Mapping[str, Any]
    ) -> list[Path]:
        """Write all `names`: `contents`, and `numbers` as JSON. Files of an earlier report go.

        Checks first.
        """
        self.check(names)
        before = self._made_before()
        # The list of files goes first: whatever happens later, the next report knows them as its own.
        listed = json.dumps({"format": self.format, "files": list(names), **numbers}, indent=2) + "\n"
        for name, content in {self.numbers: listed.encode(), **contents}.items():
            with atomic_write(self.out / name) as temporary:
                temporary.write_bytes(content)
        for name in before - set(names):
            (self.out / name).unlink(missing_ok=True)
        return [self.out / name for name in names]

    def _made_before(self) -> set[str]:
        """Names of the report's files that is there already; of a list that was changed only what can be."""
        try:
            values = json.loads((self.out / self.numbers).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return set()
        if not isinstance(values, dict) or values.get("format") != self.format:
            return set()
        listed = values.get("files")
        return (
            {n for n in listed if type(n) is str and self.is_ours(n)} if isinstance(listed, list) else set()
        )
