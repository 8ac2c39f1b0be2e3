"""Where documents come from. A document is one piece of text with a name."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_NOT_LIBRARY = {
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "turtledemo",
}  # fmt: skip


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
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"{path}: holds no text")
        yield Document(str(path), text)


def paragraphs(document: Document, size: int) -> Iterator[Document]:
    """Cut a long text at blank lines into documents of at least `size` characters (the last may be less).

    A single book still gives enough documents to hold some out.
    """
    part: list[str] = []
    length = count = 0
    for paragraph in document.text.split("\n\n"):
        part.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield Document(f"{document.name}#{count}", "\n\n".join(part))
            part, length, count = [], 0, count + 1
    if part and (rest := "\n\n".join(part)).strip():
        yield Document(f"{document.name}#{count}", rest)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # a template or a test of the parser itself
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"
