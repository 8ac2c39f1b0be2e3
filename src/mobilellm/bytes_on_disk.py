"""How much a file, or all that lies in a directory, takes."""

from __future__ import annotations

from pathlib import Path


def bytes_on_disk(path: Path) -> int:
    """Of a link, what it leads to."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
