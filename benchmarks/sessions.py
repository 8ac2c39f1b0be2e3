"""What sessions, guesses from the prompt and a batch save, with a model of random weights.

    python benchmarks/sessions.py --json docs/results/sessions.json

A prompt of which all but the end was read before: seconds to the first token, with and without the session.
Guesses: the time to write given texts, one that is its prompt but for a name and one that goes on from it;
the model computes every token, and what it draws is decided by the text, so that weights need not be trained.
Batch: tokens a second of 1, 2, 4 and 8 texts at once. Medians of rounds that take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import statistics
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from model_files import gguf_file
from numpy.typing import NDArray

import mobilellm.runtime
from mobilellm.completion import NewToken
from mobilellm.runtime import Decoding
from mobilellm.runtime.bench import fed_tokens
from mobilellm.runtime.decoding import Limit
from mobilellm.runtime.generation import HeldTokens, advance
from mobilellm.runtime.session import RuntimeModel

PROMPT, NEW, WRITTEN, TEXTS, GUESSES = 1024, 32, 200, (1, 2, 4, 8), (0, 3, 6, 10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="125m:Q8_0", help="SHAPE:TYPE, or a .gguf file")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = gguf_file(arguments.model, folder)
        model = mobilellm.runtime.load(file, arguments.threads, engine="native")
        measured = {
            "model": arguments.model,
            "isa": model.engine.isa,  # type: ignore[attr-defined]
            "session": _session(model, arguments.rounds),
            "guesses": {
                name: _guesses(model, text, arguments.rounds) for name, text in _texts(model).items()
            },
            "batch_tokens_per_second": _batch(model, arguments.rounds),
        }
    machine.write(arguments.json, measured)


def _session(model: RuntimeModel, rounds: int) -> dict[str, Any]:
    prompt = [int(token) for token in fed_tokens(PROMPT + NEW, model.tokenizer.vocab_size)]
    session = model.session()

    def seconds(generate: Iterator[NewToken]) -> float:
        start = time.perf_counter()
        next(generate)
        return time.perf_counter() - start

    with_session, without, reused = [], [], 0
    for _ in range(rounds):
        next(session.generate_tokens(prompt[:PROMPT], max_new_tokens=1))
        with_session.append(seconds(session.generate_tokens(prompt, max_new_tokens=1)))
        assert session.usage is not None
        reused = session.usage.reused
        without.append(seconds(model.generate_tokens([prompt], max_new_tokens=1)))
    return {
        "prompt_tokens": len(prompt),
        "reused": reused,
        "first_token_seconds": round(statistics.median(with_session), 4),
        "without_session": round(statistics.median(without), 4),
    }


def _texts(model: RuntimeModel) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and the text after it, in tokens."""
    source = inspect.getsource(textwrap)
    code = model.tokenizer.encode(source[: 4 * PROMPT])[:PROMPT]
    edited = model.tokenizer.encode(source.replace("text", "string"), bos=False)[:WRITTEN]
    half = len(code) // 2
    return {
        "an edit of the prompt": (code, edited),
        "the prompt going on": (code[:half], code[half:][:WRITTEN]),
    }


class _Dictated:
    """The engine, with logits that say the next token of a text."""

    def __init__(self, engine: Any, text: Sequence[int]) -> None:
        self._engine, self._text = engine, np.array(text)
        self._next: NDArray[np.int64] = np.empty(0, np.int64)

    def forward_batch(self, feeds: Sequence[tuple[NDArray[np.integer], Any]]) -> NDArray[np.float32]:
        ((tokens, cache),) = feeds
        self._next = self._text[cache.length + 1 : cache.length + 1 + len(tokens)]
        states: NDArray[np.float32] = self._engine.forward_batch(feeds)
        return states

    def logits(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._engine.logits(states)
        logits[np.arange(len(logits)), self._next[-len(logits) :]] = np.float32(1e9)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _guesses(model: RuntimeModel, text: tuple[list[int], list[int]], rounds: int) -> dict[str, Any]:
    prompt, written = text
    dictated = dataclasses.replace(model, engine=_Dictated(model.engine, prompt + written))
    seconds: dict[int, list[float]] = {most: [] for most in GUESSES}
    shares = {}
    for _ in range(rounds):
        for most in GUESSES:
            session = dictated.session()
            new = session.generate_tokens(
                prompt, max_new_tokens=len(written), decoding=Decoding(prompt_lookup=most)
            )
            assert next(new).token == written[0]
            start = time.perf_counter()
            assert [each.token for each in new] == written[1:]
            seconds[most].append(time.perf_counter() - start)
            usage = session.usage
            assert usage is not None
            shares[most] = usage.accepted / max(1, usage.guessed)
    return {
        str(most): {
            "tokens_per_second": round((len(written) - 1) / statistics.median(seconds[most]), 1),
            "accepted_share": round(shares[most], 3),
            "times_faster": round(statistics.median(seconds[0]) / statistics.median(seconds[most]), 2),
        }
        for most in GUESSES
    }


def _batch(model: RuntimeModel, rounds: int) -> dict[str, float]:
    prompt = [int(token) for token in fed_tokens(64, model.tokenizer.vocab_size)]

    def write(count: int) -> float:
        rows = [
            model.generation(HeldTokens(model.engine, 256), [*prompt, 300 + row], Limit(NEW + 1, "length"))
            for row in range(count)
        ]
        advance(model.engine, rows, 10**6)
        start = time.perf_counter()
        tokens = 0
        while not all(row.finish for row in rows):
            tokens += len(advance(model.engine, rows))
        return tokens / (time.perf_counter() - start)

    rates: dict[int, list[float]] = {count: [] for count in TEXTS}
    for _ in range(rounds):
        for count in TEXTS:
            rates[count].append(write(count))
    return {str(count): round(statistics.median(rates[count]), 1) for count in TEXTS}


if __name__ == "__main__":
    main()
