"""What one may do with a model, as its directory says. A converted model stays under it."""

from __future__ import annotations

import re
from pathlib import Path

from mobilellm.model_directory import LICENCE_FILES

CARD = "README.md"


def licence_files(directory: Path) -> list[Path]:
    """The licence texts of a model directory and its model card."""
    found = {file for pattern in (*LICENCE_FILES, CARD) for file in directory.glob(pattern) if file.is_file()}
    return sorted(found)


def stated_licence(directory: Path) -> str | None:
    """The licence in the head of the model card, else the names of the licence texts; None without either."""
    card = directory / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    for key in ("license_name", "license"):  # the first names what the second calls "other"
        if head and (found := re.search(rf"^{key}:[ \t]*([^\s#].*?)[ \t]*$", head[1], re.MULTILINE)):
            return found[1].strip("\"'")
    names = [file.name for file in licence_files(directory) if file.name != CARD]
    return f"in {', '.join(names)}" if names else None
