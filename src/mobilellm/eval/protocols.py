"""Perplexity by a named protocol. Numbers of different protocols, or windows, are not comparable.

    reference   the protocol of the MobileLLM repository: rows joined by blank lines, one BOS in front,
                windows of 2,048 tokens that do not overlap and see nothing of each other, the tail dropped;
                each window predicts all but its first token
    sliding     windows move on by a stride; each predicts what the one before did not reach, so that every
                token but the first is predicted once, with at least window - stride tokens before it
    document    every document by itself, as lm-eval's loglikelihood_rolling: all its tokens, the first from
                BOS; a document longer than the context goes on in windows that see one token of the last

Words and bytes count the text that was predicted: perplexity per word and bits per byte do not depend on the
tokenizer, as far as the protocol lets them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mobilellm.eval.interface import LanguageModel, Request
from mobilellm.eval.texts import Document

REFERENCE_WINDOW = 2048
_WORD = re.compile(r"\S+")


class Unit(NamedTuple):
    """What counts as one observation, a window or a document: its requests, words and bytes."""

    requests: tuple[Request, ...]
    words: int
    bytes: int


def reference(model: LanguageModel, text: str, window: int) -> list[Unit]:
    """Windows of the reference's protocol (its eval.py). Raises ValueError where none is full."""
    tokens, spans = _tokens(model, text)
    count = len(tokens) // window
    if count == 0:
        raise ValueError(
            f"perplexity: the text has {len(tokens)} tokens and the reference protocol drops what does not "
            f"fill a window of {window}; take a longer text, a smaller --window or --protocol sliding"
        )
    return [_unit(tokens, spans, i * window, i * window + 1, (i + 1) * window) for i in range(count)]


def sliding(model: LanguageModel, text: str, window: int, stride: int) -> list[Unit]:
    """Windows that move on by `stride` tokens, each predicting what is new in it."""
    if not 1 <= stride < window:
        raise ValueError(f"perplexity: stride = {stride} must lie in 1 … {window - 1}, below the window")
    tokens, spans = _tokens(model, text)
    if len(tokens) < 2:
        raise ValueError(f"perplexity: a text of {len(tokens)} tokens predicts nothing; take a longer one")
    units, reached = [], 1
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        units.append(_unit(tokens, spans, start, reached, end))
        reached = end
        if end == len(tokens):
            break
    return units


def document(model: LanguageModel, documents: Sequence[Document], window: int) -> list[Unit]:
    """One unit a document. As in lm-eval, tokens are predicted as the tokenizer gives them.

    A tokenizer that puts a BOS in front therefore has it predicted too, from the BOS that stands there.
    """
    units = []
    encoded = model.encode([each.content for each in documents])
    for each, tokens in zip(documents, encoded, strict=True):
        if tokens:
            units.append(Unit(tuple(_rolling(model.bos, tokens, window)), each.words, each.bytes))
    if not units:
        raise ValueError("perplexity: there is no document to predict")
    return units


def score(
    model: LanguageModel, units: Sequence[Unit], progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Totals over all units, and for each unit its nats, tokens, words and bytes.

    `progress` is told how many tokens are predicted, and of how many.
    """
    requests = [request for unit in units for request in unit.requests]
    owners = [number for number, unit in enumerate(units) for _ in unit.requests]
    nats = np.zeros(len(units))
    done, total = 0, sum(len(request.continuation) for request in requests)
    for index, answer in model.log_likelihoods(requests):
        nats[owners[index]] -= answer.total
        done += len(requests[index].continuation)
        if progress is not None:
            progress(done, total)
    assert done == total, "a model must answer every request once"
    tokens = [sum(len(request.continuation) for request in unit.requests) for unit in units]
    items = {
        "nats": nats.tolist(),
        "tokens": [float(each) for each in tokens],
        "words": [float(unit.words) for unit in units],
        "bytes": [float(unit.bytes) for unit in units],
    }
    words, size = sum(unit.words for unit in units), sum(unit.bytes for unit in units)
    sum_of_nats = math.fsum(items["nats"])
    results = {
        "nats": sum_of_nats,
        "tokens": total,
        "words": words,
        "bytes": size,
        "units": len(units),
        "token_perplexity": _exponential(sum_of_nats / total),
        "word_perplexity": _exponential(sum_of_nats / words) if words else None,
        "bits_per_byte": sum_of_nats / math.log(2) / size if size else None,
    }
    return results, items


def _tokens(model: LanguageModel, text: str) -> tuple[list[int], _Spans]:
    """The ids the tokenizer gives the whole text, a BOS in front where it puts one, and where they lie."""
    plain, places = model.encode_with_places(text)
    with_special = model.encode([text])[0]
    front = len(with_special) - len(plain)
    while front > 0 and with_special[front : front + len(plain)] != plain:
        front -= 1  # it puts something behind, too: that is no part of the text
    if with_special[front : front + len(plain)] != plain:
        raise ValueError("perplexity: the tokenizer gives other ids with its special tokens than without")
    return with_special[:front] + plain, _Spans(text, [0] * front + places)


class _Spans:
    """Words and bytes of the text between two tokens."""

    def __init__(self, text: str, places: Sequence[int]) -> None:
        self._places = [*places, len(text)]
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)  # of a character in UTF-8
        self._bytes = np.concatenate([[0], widths.cumsum()])
        begins = np.zeros(len(text) + 1, dtype=np.int64)
        begins[[match.start() + 1 for match in _WORD.finditer(text)]] = 1
        self._words = begins.cumsum()

    def words(self, start: int, end: int) -> int:
        """Words that begin in the tokens from `start` up to `end`."""
        return int(self._words[self._places[end]] - self._words[self._places[start]])

    def bytes(self, start: int, end: int) -> int:
        return int(self._bytes[self._places[end]] - self._bytes[self._places[start]])


def _unit(tokens: Sequence[int], spans: _Spans, start: int, first: int, end: int) -> Unit:
    """A window that begins at token `start` and predicts tokens `first` up to `end`."""
    request = Request(tuple(tokens[start:first]), tuple(tokens[first:end]))
    return Unit((request,), spans.words(first, end), spans.bytes(first, end))


def _rolling(bos: int, tokens: Sequence[int], window: int) -> list[Request]:
    """lm-eval's windows with one token of context: the first predicts from BOS, the last is kept full."""
    first = min(window, len(tokens))
    requests = [Request((bos,), tuple(tokens[:first]))]
    done = first
    while done < len(tokens):
        count = min(window, len(tokens) - done)
        end = done + count
        # The last window is filled up from the left with what was predicted before.
        requests.append(Request(tuple(tokens[end - window - 1 : done]), tuple(tokens[done:end])))
        done = end
    return requests


def _exponential(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)
