"""The real text an artefact is compared on, and the questions made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mobilellm.chat_template import ChatTemplate
from mobilellm.data.documents import paragraphs, python_documentation, text_files
from mobilellm.export.questions import ChatQuestion, Questions
from mobilellm.tokenizer import EOS_ID, Tokenizer

WINDOW = 256
"""Most tokens that are fed at once."""
_STEPS, _PROMPT, _NEW, _STOP_AFTER = 48, 16, 24, 3
_ANSWER, _SHORTEST_ANSWER = 48, 12
_TALK = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is a river?"},
    {"role": "assistant", "content": "Water that flows to the sea."},
    {"role": "user", "content": "And  what is a lake?"},
]
_MOST_CHARACTERS, _DOCUMENT = 200_000, 4_000
_ODD_TEXTS = [
    "naïve café — “quotes” … 中文 日本語 русский עברית",
    "👩\u200d👩\u200d👧 e\u0301 \u00a0 a\u0000b",
    "    four, then  two   and three ",
    "def f(x):\n\tif x:\n        return  x\n\n\n",
    "1234567890 000 ======== ---- ////",
    "</s> <s> <unk> <0x41>",
]


@dataclass(frozen=True)
class SampleText:
    name: str
    documents: list[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


def sample_text(file: Path | None) -> SampleText:
    """Of a file, or else of the documentation every Python carries: up to 200,000 characters.

    Raises FileNotFoundError or ValueError for what is no text.
    """
    found = text_files([file]) if file else python_documentation()
    documents = islice(_some(part.text for each in found for part in paragraphs(each, _DOCUMENT)), 200)
    return SampleText(str(file) if file else "documentation of Python", list(documents))


def questions(
    text: SampleText, tokenizer: Tokenizer, context: int, tokens: int, chat_template: str | None = None
) -> Questions:
    """Windows over documents spread through the text, `tokens` ids in all or as many as there are.

    Raises ValueError for a text of less than a few words.
    """
    encoded = tokenizer.encode_batch(text.documents)
    most = min(WINDOW, context)
    ranked = sorted(encoded, key=lambda ids: len(ids) < most)  # stable: long ones first
    long = [ids[:most] for ids in ranked if len(ids) >= min(most, len(ranked[0]))]
    count = max(1, min(len(long), tokens // most))
    windows = [long[index * len(long) // count] for index in range(count)]
    room = context - 1
    prompt = windows[0][: min(_PROMPT, max(1, room // 2))]
    if len(windows[0]) < 2 or room < len(prompt) + _STOP_AFTER + 1:
        raise ValueError(f"{text.name}: too short a text, or a context of {context}, to compare anything on")
    return Questions(
        texts=text.documents + _ODD_TEXTS,
        windows=windows,
        steps=windows[0][:_STEPS],
        prompt=prompt,
        most=min(_NEW, room - len(prompt)),
        stop=(_STOP_AFTER, EOS_ID),
        chat=None if chat_template is None else _chat(ChatTemplate(chat_template, tokenizer), context),
    )


def _chat(template: ChatTemplate, context: int) -> ChatQuestion | None:
    """The longest talk that the template takes and that leaves room for an answer; None without one."""
    for messages in (_TALK, _TALK[1:], _TALK[1:2]):
        try:
            ids = template.prompt(messages)
        except ValueError:  # some know no system message
            continue
        if context - len(ids) >= _SHORTEST_ANSWER:
            return ChatQuestion(messages, ids, min(_ANSWER, context - len(ids)))
    return None


def _some(texts: Iterator[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        if characters >= _MOST_CHARACTERS:
            return
        characters += len(text)
        yield text[:_MOST_CHARACTERS]
