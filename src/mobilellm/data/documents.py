"""Where documents come from. A document is one piece of text with a name."""

from __future__ import annotations

import ast
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_NOT_LIBRARY = {
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "turtledemo",
}  # fmt: skip


_BLOCKS = ("body", "handlers", "cases", "orelse", "finalbody")  # as they follow each other in a file


class Document(NamedTuple):
    name: str
    text: str


def python_documentation() -> Iterator[Document]:
    """Real prose that every Python installation carries, about 2 MB of it.

    The language reference as `pydoc_data` holds it (one document a topic), and the docstrings of the
    standard library (one document a module), in a fixed order. They come under Python's own licence.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc:{name}", topics[name])
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(relative.parts) and not relative.parts[0].startswith("config-"):
            text = "\n\n".join(_docstrings(path))
            if text:
                yield Document(f"stdlib:{relative.as_posix()}", text)


def text_files(paths: Sequence[Path]) -> Iterator[Document]:
    """One document a UTF-8 text file. Raises FileNotFoundError or ValueError naming the file."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text file")
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"{path}: holds no text")
        yield Document(str(path), text)


def paragraphs(document: Document, size: int) -> Iterator[Document]:
    """Cut a long text into documents of about `size` characters: a single book gives enough to hold some out.

    A cut falls on the first blank line (white space is blank) after `size` characters; in text without blank
    lines, at the end of a line before 4 * size. Line ends around a cut go, and so do parts without text; all
    the rest stays.
    """
    lines = document.text.splitlines(keepends=True)
    part: list[str] = []
    length = count = 0
    for number, line in enumerate(lines, 1):
        part.append(line)
        length += len(line)
        following = len(lines[number]) if number < len(lines) else 0
        last, blank = number == len(lines), not line.strip()
        if last or (length >= size and (blank or length + following > 4 * size)):
            text = "".join(part).strip("\r\n")
            if text.strip():
                yield Document(f"{document.name}#{count}", text)
                count += 1
            part, length = [], 0


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return  # a dangling link, a template, not UTF-8, a null byte
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, without the expressions: nothing in one has a docstring."""
    found: deque[ast.AST] = deque([tree])
    while found:
        node = found.popleft()
        yield node
        for block in _BLOCKS:
            found.extend(getattr(node, block, ()))
