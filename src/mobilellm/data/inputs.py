"""What the words on a command line mean: files, folders, patterns, standard input, data sets on the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mobilellm.data.compression import SUFFIXES

Format = Literal["text", "jsonl", "parquet"]

STDIN = "-"
HUB = "hf://"

_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Source(NamedTuple):
    """One file, standard input, or a data set. `size` in bytes, None if not known; `modified` in ns."""

    name: str
    format: Literal["text", "jsonl", "parquet", "hub"]
    size: int | None = None
    modified: int = 0


class Sources(NamedTuple):
    """In the order in which they are read; `passed_over` are files in folders whose names say no format."""

    read: tuple[Source, ...]
    passed_over: tuple[str, ...]


def find_sources(inputs: Sequence[str], format: Format | None = None) -> Sources:
    """The sources that `inputs` name, each once. `format` is for what has no telling name.

    Folders are searched to the bottom, in the order of names, links followed; without `format`, files in them
    whose names tell none are passed over. Raises FileNotFoundError or ValueError naming the input.
    """
    if not inputs:
        raise ValueError("no input: name files, folders, patterns, '-', or a data set on the Hub")
    found: dict[str, Source] = {}
    passed_over: list[str] = []
    for word in inputs:
        for source in _sources(word, format, passed_over):
            key = (
                source.name
                if source.format == "hub" or source.name == STDIN
                else os.path.realpath(source.name)
            )
            found.setdefault(key, source)
    if not found:
        raise FileNotFoundError(
            f"{', '.join(inputs)}: no file there whose name tells its format ({', '.join(_FORMATS)}, packed "
            "or not); --format tells what the others are"
        )
    first = next(iter(found.values()))
    if format is not None and all(source.format != format for source in found.values()):
        raise ValueError(
            f"format = {format!r} is for inputs whose names do not tell what they are; {first.name} is "
            f"{first.format}; leave --format out, rename the file, or give it by standard input"
        )
    return Sources(tuple(found.values()), tuple(passed_over))


def _sources(word: str, format: Format | None, passed_over: list[str]) -> Iterator[Source]:
    path = Path(word)
    if word in ("", HUB):
        raise ValueError(f"{word!r}: an input without a name; name files, folders, patterns or a data set")
    if word == STDIN:
        if format is None or format == "parquet":
            raise ValueError("standard input: say what it holds with --format text or --format jsonl")
        yield Source(STDIN, format)
    elif word.startswith(HUB):
        yield Source(word.removeprefix(HUB), "hub")
    elif path.is_dir():
        yield from _files(_below(path), format, passed_over)
    elif path.exists():
        yield _file(path, format)
    elif glob.has_magic(word):
        matches = sorted(glob.glob(word, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{word}: no file matches this pattern")
        folders = {match: None for match in matches if os.path.isdir(match)}  # ordered
        yield from (_file(Path(match), format) for match in matches if match not in folders)
        if word.endswith(("**", "**/*")) and len(folders) < len(matches):
            return  # which stands for what lies in them, too
        for folder in folders:
            yield from _files(_below(Path(folder)), format, passed_over)
    elif _HUB_NAME.fullmatch(word) and format_of(path) is None:
        yield Source(word, "hub")
    else:
        raise FileNotFoundError(f"{word}: no such file or folder")


def format_of(path: Path) -> Format | None:
    """What a file's name tells of its content, packed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _below(folder: Path) -> Iterator[Path]:
    """All files, by the first path to each folder: links may lead back up."""
    entered: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _files(paths: Iterable[Path], format: Format | None, passed_over: list[str]) -> Iterator[Source]:
    for path in paths:
        if format is None and format_of(path) is None:
            passed_over.append(str(path))
        else:
            yield _file(path, format)


def _file(path: Path, format: Format | None) -> Source:
    known = format_of(path) or format
    if known is None:
        raise ValueError(
            f"{path}: its name does not tell what it is ({', '.join(_FORMATS)}, packed or not); say it with "
            "--format"
        )
    status = path.stat()
    return Source(str(path), known, status.st_size, status.st_mtime_ns)
