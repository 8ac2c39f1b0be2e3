"""The page of a run: one file, whatever a model says stays text."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.report.page import run_page

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></body><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "' autofocus onfocus='alert(1)",
    "<!-- ",
    "]]>",
    "&lt;b&gt; &amp;amp;",
    "<style>*{display:none}</style>",
    '<link href="http://evil.example/x.css">',
    "\n\nlines\n",
    "{{7*7}} ${7*7}",
]
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Every tag, attribute and text, and that tags close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data


def page(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "A run",
        "lead": "What it was.",
        "results": [("text", "before", "after"), ("perplexity", "50.0", "5.0")],
        "facts": {"steps": "10"},
        "picture": b"\x89PNG not quite",
        "samples": [("Once", " upon a time")],
        "commands": ["mobilellm info here"],
    }
    return run_page(**(arguments | changes))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_everything_is_on_it() -> None:
    reader = read(page())
    assert reader.texts["title"] == ["A run"]
    assert reader.texts["h1"] == ["A run"]
    assert reader.texts["td"] == ["perplexity", "50.0", "5.0", "steps", "10"]
    assert reader.texts["th"][:3] == ["text", "before", "after"]
    assert reader.texts["pre"] == ["Once upon a time", "mobilellm info here"]
    assert reader.texts["b"] == ["Once"]
    (picture,) = [value for _, name, value in reader.attributes if name == "src"]
    assert picture is not None
    kind, _, data = picture.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == b"\x89PNG not quite"
    assert ("meta", "charset", "utf-8") in reader.attributes
    assert page().startswith("<!doctype html>")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("where", ["title", "lead", "results", "facts", "prompt", "completion", "commands"])
def test_hostile_text_stays_text(text: str, where: str) -> None:
    changes: dict[str, Any] = {
        "title": {"title": text},
        "lead": {"lead": text},
        "results": {"results": [("head", text), (text, "cell")]},
        "facts": {"facts": {text: text}},
        "prompt": {"samples": [(text, "!")]},
        "completion": {"samples": [("Once", text)]},
        "commands": {"commands": [text]},
    }[where]
    reader, plain = read(page(**changes)), read(page())
    assert set(reader.tags) == set(plain.tags)  # no tag and no attribute that is not ours
    assert {(tag, name) for tag, name, _ in reader.attributes} == {
        (tag, name) for tag, name, _ in plain.attributes
    }
    assert text in {
        part.removeprefix("Once").removesuffix("!") for parts in reader.texts.values() for part in parts
    }


@given(st.text(), st.text())
def test_any_completion_can_be_read_back(prompt: str, completion: str) -> None:
    """Letter for letter, but for what HTML itself cannot hold."""
    reader = read(page(samples=[(prompt, completion)]))
    assert reader.texts["pre"][0] == prompt + completion


def test_it_needs_nothing_from_outside() -> None:
    """No script, no host, no other file: it can be mailed."""
    text = page()
    reader = read(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    assert all(
        (value or "").startswith("data:") for _, name, value in reader.attributes if name in ("src", "href")
    )


def test_nothing_to_show_is_no_fault() -> None:
    reader = read(page(results=[], facts={}, samples=[], commands=[], picture=b""))
    assert "td" not in reader.texts
