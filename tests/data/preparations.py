"""What the tests of preparation share: a corpus with everything in it, and workers that run in the process."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from mobilellm.data.chunks import Chunk
from mobilellm.data.screening import Examined, Screen, ScreenSettings
from mobilellm.data.shards import read_split
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer


class InlineWorkers:
    """In place of `Workers`: examines at once, so that a test can start hundreds of preparations."""

    def __init__(self, count: int, settings: ScreenSettings, tokenizer: Tokenizer) -> None:
        self._screen = Screen(settings, tokenizer)

    def submit(self, chunks: Sequence[Chunk]) -> Future[list[Examined]]:
        future: Future[list[Examined]] = Future()
        future.set_result([self._screen.examine(chunk) for chunk in chunks])
        return future

    def close(self) -> None:
        pass


def texts_of(directory: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents of a split, cut at BOS and EOS and decoded."""
    ids = np.asarray(read_split(directory, split, tokenizer))
    starts, ends = np.flatnonzero(ids == BOS_ID), np.flatnonzero(ids == EOS_ID)
    assert len(starts) == len(ends)
    assert starts[0] == 0
    assert (starts[1:] == ends[:-1] + 1).all()
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[start + 1 : end].tolist()) for start, end in zip(starts, ends, strict=True)]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_corpus(folder: Path, documents: int = 300, seed: int = 0) -> list[str]:
    """Two JSONL files and a text file with good and bad records. The texts of the good ones, in order."""
    generator = random.Random(seed)
    words = [
        f"{a}{b}" for a in ("ba", "no", "ti", "ra", "se", "lu") for b in ("do", "mi", "", "ka", "ne", "st")
    ]
    texts: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.jsonl", "b.jsonl"):
        lines = []
        for number in range(documents // 2):
            text = (
                " ".join(generator.choices(words, k=generator.randrange(3, 60))) + f".\n\n{name} {number} é"
            )
            texts.append(text)
            lines.append(json.dumps({"id": number, "text": text}, ensure_ascii=bool(number % 2)))
            if number % 40 == 7:
                lines += [
                    json.dumps({"text": text}),
                    "{broken",
                    '{"text": 5}',
                    '{"body": "x"}',
                    '{"text": " "}',
                    "",
                ]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = "A file of its own.\n" + "And it is long. " * 50
    (folder / "c.txt").write_text(text, encoding="utf-8")
    return [*texts, text]
