"""The page of answers: all of it escaped, all of it there."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from mobilellm.completion import Completion, FinishReason
from mobilellm.eval.chat import Answered
from mobilellm.report.sample_sheet import Column, sample_sheet

HOSTILE = "<script>alert(1)</script>\n&amp; \"'"


def answered(text: str | None, finish: FinishReason = "eos", tokens: int = 3) -> Answered:
    call = {"function": {"name": "f", "arguments": {"a": HOSTILE}}}
    messages = [
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    completion = None if text is None else Completion(text, [5] * tokens, finish)
    return Answered(messages, f"reference {HOSTILE}", completion)


class Reader(HTMLParser):
    """What is shown, and which elements there are; complains of what is not closed in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", set[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page() -> None:
    columns = [
        Column(f"first {HOSTILE}", [answered(HOSTILE), answered("two", "length")]),
        Column("second", [answered(None), answered("three", "context"), answered("never shown")]),
    ]
    page = sample_sheet(f"file {HOSTILE}", columns)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) >= 2 * 4
    assert "2 prompts" in reader.text
    for words in ("2 tokens, ended by itself", "3 tokens, cut off at the limit", "the prompt fills the context",
                  "3 tokens, cut off where the context is full"):  # fmt: skip
        assert words in reader.text
    assert "never shown" not in page
    assert not re.search(r"https?://|src=|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
