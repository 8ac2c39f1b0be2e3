"""Perplexity of texts by a protocol, as one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mobilellm.eval import protocols
from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.protocols import Unit
from mobilellm.eval.record import Record, record
from mobilellm.eval.texts import WIKITEXT2, Text, articles, joined_rows, read_text, whole

Protocol = Literal["reference", "sliding", "document"]
Rows = Literal["joined", "as-is"]
Documents = Literal["whole", "articles"]


@dataclass(frozen=True)
class PerplexitySettings:
    protocol: Protocol = "reference"
    """reference: the MobileLLM repository's; sliding: with a stride; document: as lm-eval's wikitext. They
    are not comparable."""
    window: int | None = None
    """Tokens at once; by default the model's context, and for reference at most 2,048."""
    stride: int | None = None
    """sliding: how far windows move on; by default half the window."""
    rows: Rows | None = None
    """reference, sliding: joined puts a blank line after every line, as data sets of rows are usually read;
    as-is leaves the text alone; by default joined for reference and as-is for sliding."""
    documents: Documents | None = None
    """document: a text is one document (whole), or WikiText cut at its headings and put into ordinary English
    (articles); by default whole, and articles for wikitext2."""


def evaluate_perplexity(
    model: LanguageModel,
    sources: Sequence[str],
    settings: PerplexitySettings,
    progress: Callable[[int, int], None] | None = None,
    counts: Callable[[], tuple[int, int]] | None = None,
) -> Record:
    """Measure each text by itself; results by the name of the text.

    `progress` is told how many tokens of the text are predicted, and of how many; `counts` gives how many
    requests were scored and how many came from a cache. Raises ValueError for settings that do not go
    together or with the model, before anything is scored.
    """
    if settings.protocol not in get_args(Protocol):
        raise ValueError(
            f"protocol = {settings.protocol!r} is not known; choose one of {', '.join(get_args(Protocol))}"
        )
    window = _window(model, settings)
    stride = _stride(settings, window)
    for name, given, protocols_that_take_it in (
        ("stride", settings.stride, ("sliding",)),
        ("rows", settings.rows, ("reference", "sliding")),
        ("documents", settings.documents, ("document",)),
    ):
        if given is not None and settings.protocol not in protocols_that_take_it:
            raise ValueError(
                f"{name} = {given} does not go with the {settings.protocol} protocol; leave it out, or "
                f"choose {' or '.join(protocols_that_take_it)}"
            )
    texts = [read_text(source) for source in sources]
    names = [text.name for text in texts]
    if len(set(names)) != len(names):
        raise ValueError(f"data: two texts are called {max(names, key=names.count)}; measure them one by one")
    cut = [
        _units(model, text, source, settings, window, stride)
        for text, source in zip(texts, sources, strict=True)
    ]
    results: dict[str, dict[str, Any]] = {}
    items, begin = {}, time.perf_counter()
    for text, units in zip(texts, cut, strict=True):
        numbers, items[text.name] = protocols.score(model, units, progress)
        results[text.name] = {"protocol": settings.protocol, **numbers, "text_sha256": text.sha256}
    seconds = time.perf_counter() - begin
    scored, cached = counts() if counts else (sum(len(unit.requests) for units in cut for unit in units), 0)
    protocol: dict[str, Any] = {"name": settings.protocol, "window": window}
    if settings.protocol == "document":
        protocol["documents"] = {
            name: _documents(source, settings) for name, source in zip(names, sources, strict=True)
        }
    else:
        protocol["rows"] = _rows(settings)
    if settings.protocol == "sliding":
        protocol["stride"] = stride
    return record("perplexity", model.identity, protocol, results, items, seconds, scored, cached)


def _window(model: LanguageModel, settings: PerplexitySettings) -> int:
    if settings.window is None:
        reference = settings.protocol == "reference"
        return min(model.context, protocols.REFERENCE_WINDOW) if reference else model.context
    if not 2 <= settings.window <= model.context:
        raise ValueError(
            f"window = {settings.window} must lie in 2 … {model.context}, the context of the model"
        )
    return settings.window


def _stride(settings: PerplexitySettings, window: int) -> int:
    return max(1, window // 2) if settings.stride is None else settings.stride


def _units(
    model: LanguageModel, text: Text, source: str, settings: PerplexitySettings, window: int, stride: int
) -> list[Unit]:
    if settings.protocol == "document":
        documents = articles(text) if _documents(source, settings) == "articles" else whole(text)
        return protocols.document(model, documents, window)
    content = joined_rows(text) if _rows(settings) == "joined" else text.content
    if settings.protocol == "reference":
        return protocols.reference(model, content, window)
    return protocols.sliding(model, content, window, stride)


def _rows(settings: PerplexitySettings) -> Rows:
    return settings.rows or ("joined" if settings.protocol == "reference" else "as-is")


def _documents(source: str, settings: PerplexitySettings) -> Documents:
    return settings.documents or ("articles" if source == WIKITEXT2 else "whole")
