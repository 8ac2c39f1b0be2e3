"""Where documents come from: Python's own documentation, text files, and long texts cut into pieces."""

from __future__ import annotations

import itertools
import json
import re
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mobilellm.data.documents import Document, paragraphs, python_documentation, text_files


@pytest.fixture(scope="module")
def documentation() -> list[Document]:
    return list(python_documentation())


def test_python_documentation_is_enough_to_learn_from(documentation: list[Document]) -> None:
    assert sum(len(document.text.encode()) for document in documentation) > 1_500_000
    names = [document.name for document in documentation]
    assert len(set(names)) == len(names)
    texts = dict(documentation)
    assert "anonymous function" in texts["pydoc:lambda"]
    assert (json.__doc__ or "?").strip() in texts["stdlib:json/__init__.py"]
    assert "load: Deserialize" in texts["stdlib:json/__init__.py"]
    assert all(text.strip() for text in texts.values())


def test_python_documentation_leaves_out_what_is_no_library(documentation: list[Document]) -> None:
    modules = [name.removeprefix("stdlib:") for name, _ in documentation if name.startswith("stdlib:")]
    assert {"argparse.py", "json/decoder.py", "os.py"} <= set(modules)
    assert not [name for name in modules if re.search(r"site-packages|(^|/)tests?/|^config-|idlelib", name)]


def test_python_documentation_comes_in_a_fixed_order(documentation: list[Document]) -> None:
    again = itertools.islice(python_documentation(), 150)
    assert list(again) == documentation[:150]


def test_modules_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docstrings only, the module's first; what is no readable Python is passed over."""
    files = {
        "b.py": b'"""Module.\n\n   Indented."""\nclass A:\n    "Of a class."\n    def f(self):\n        "Of f."\n',
        "a/__init__.py": b'async def g():\n    """Of g."""\n\ndef undocumented(): pass\n',
        "a/tests/x.py": b'"""A test."""',
        "site-packages/x.py": b'"""Not Python\'s."""',
        "config-3.99-x86/x.py": b'"""Of the build."""',
        "none.py": b"x = 'not a docstring'\n",
        "latin.py": b'# -*- coding: latin-1 -*-\n"""caf\xe9"""\n',
        "broken.py": b'"""Fine""" def',
        "null.py": b'"""Null\x00"""',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.py").symlink_to("nowhere.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    modules = [document for document in python_documentation() if document.name.startswith("stdlib:")]
    assert modules == [
        Document("stdlib:a/__init__.py", "g: Of g."),
        Document("stdlib:b.py", "Module.\n\nIndented.\n\nA: Of a class.\n\nf: Of f."),
    ]


def test_text_files(tmp_path: Path) -> None:
    contents = {"plain": b"Zo\xc3\xab\n", "mark": b"\xef\xbb\xbfwith a mark", "windows": b"a\r\n\r\nb\r\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read = text_files([tmp_path / name for name in contents])
    assert [document.text for document in read] == ["Zoë\n", "with a mark", "a\n\nb\n"]
    (document,) = text_files([tmp_path / "plain"])
    assert document.name == str(tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing", None, FileNotFoundError, "no such text file"),
        (".", None, FileNotFoundError, "no such text file"),
        ("binary", b"ab\xff", ValueError, "not UTF-8 text (invalid start byte at byte 2)"),
        ("empty", b"", ValueError, "holds no text"),
        ("blank", b" \n\t\n", ValueError, "holds no text"),
    ],
)
def test_text_files_that_are_none(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], words: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=re.escape(f"{file}: {words}")):
        list(text_files([file]))


def cut(text: str, size: int) -> list[str]:
    return [part.text for part in paragraphs(Document("d", text), size)]


def test_cuts_fall_on_blank_lines() -> None:
    assert cut("aaaa\nbb\n\ncc\n\ndd\n\nee", 8) == ["aaaa\nbb", "cc\n\ndd", "ee"]
    assert cut("aaaa\n \t\nbbbb\n\n\n\n", 4) == ["aaaa\n \t", "bbbb"]  # white space is blank
    assert [part.name for part in paragraphs(Document("d", "aaaa\n\nbbbb"), 4)] == ["d#0", "d#1"]


def test_text_without_blank_lines_is_cut_at_line_ends() -> None:
    assert cut("aaaa\n" * 10, 5) == ["\n".join(["aaaa"] * 4), "\n".join(["aaaa"] * 4), "aaaa\naaaa"]
    assert cut("a" * 100, 5) == ["a" * 100]  # one line stays one
    assert cut("aa\n" + "b" * 100 + "\ncc", 2) == ["aa", "b" * 100, "cc"]


def test_text_of_nothing_gives_no_documents() -> None:
    assert cut("", 5) == cut(" \n\n \n", 1) == []


@given(st.text(alphabet="ab \n\r\t\x0cé\u2028"), st.integers(1, 12))
@example("a\n\n\n\nb", 1)
def test_cutting_loses_nothing_but_line_ends(text: str, size: int) -> None:
    parts = cut(text, size)
    at = 0
    for part in parts:
        at = text.index(part, at) + len(part)  # in order, and none twice
    assert "".join("".join(parts).split()) == "".join(text.split())
    longest_line = max(map(len, text.splitlines(keepends=True)), default=0)
    assert all(part.strip() and len(part) <= max(4 * size, size - 1 + longest_line) for part in parts)


def test_real_text_whose_blank_lines_hold_a_space(shared: Path) -> None:
    (document,) = text_files([shared / "wikitext2" / "wiki.test.raw"])
    assert "\n\n" not in document.text
    parts = cut(document.text, 4000)
    assert len(parts) > 200
    assert max(map(len, parts)) < 16_000
    assert min(map(len, parts[:-1])) > 3_990
    assert "".join("".join(parts).split()) == "".join(document.text.split())
