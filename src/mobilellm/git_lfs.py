"""Git LFS: a clone made without it has short text files where the large ones should be."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def pointer_problem(file: Path) -> str:
    """What to do about a file that only points to the real one; "" for any other file."""
    with file.open("rb") as stream:
        if stream.read(len(_BEGINNING)) != _BEGINNING:
            return ""
    return "only a Git LFS pointer to the file; run `git lfs pull` in its directory, or download it"
