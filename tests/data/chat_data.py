"""Small sets of conversations for tests."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.data.chat import Conversations, read_chat
from mobilellm.tokenizer import Tokenizer

_WORDS = [
    "the",
    "a",
    "one",
    "two",
    "river",
    "sea",
    "house",
    "green",
    "old",
    "runs",
    "sleeps",
    "sees",
    "why",
    "not",
]


def sentences(count: int, most_words: int = 12, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(_WORDS, k=chance.randint(1, most_words))) for _ in range(count)]


@cache
def tokenizer() -> Tokenizer:
    texts = ["user assistant system tool name arguments Tools: {}\"'<>/_", *sentences(300)]
    return Tokenizer.train(texts, 330, min_frequency=1)


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and answers, of one to three turns."""
    chance = random.Random(seed)
    texts = sentences(6 * count, seed=seed)
    return [
        {
            "messages": [
                {"role": role, "content": texts.pop()}
                for _ in range(chance.randint(1, 3))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(count)
    ]


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def conversations(folder: Path, count: int, most_tokens: int = 10_000, seed: int = 0) -> Conversations:
    file = written(folder / "talks.jsonl", records(count, seed))
    return read_chat([file], ChatTemplate(DEFAULT, tokenizer()), most_tokens).conversations
