"""A bounded, deterministic sample of a corpus: what a tokenizer is trained on."""

from __future__ import annotations

import hashlib
import heapq
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from mobilellm.data.chunks import START
from mobilellm.data.prepare_settings import PrepareSettings, sources_of
from mobilellm.data.readers import chunks_of
from mobilellm.data.records import is_unicode, records_of
from mobilellm.data.workers import ReadAhead

_PART = 16_384
"""Characters of a part: long documents are sampled in parts, so that a few books do not fill the sample."""


class Sample(NamedTuple):
    """Parts of texts in the order of their hashes. Sizes in UTF-8 bytes; `unread` records had no text."""

    texts: list[str]
    sample_bytes: int
    text_bytes: int
    unread: int


def sample_texts(
    inputs: Sequence[str],
    settings: PrepareSettings,
    most_bytes: int,
    report: Callable[[int], None] = lambda text_bytes: None,
) -> Sample:
    """At most `most_bytes` of the text of `inputs`: all if it fits, else the parts with the lowest hashes.

    The whole input is read once; what is held in memory is the sample. It depends on the texts alone, not on
    their order; a part that comes twice counts once. Raises ValueError if no text is there.
    """
    if most_bytes < 1:
        raise ValueError(f"the sample of {most_bytes} bytes must have at least 1")
    sources = sources_of(inputs, settings).read
    heap: list[tuple[int, int, str]] = []  # minus the hash, bytes, text
    held: set[int] = set()
    size = text_bytes = unread = 0
    bound = 2**64
    fields: dict[str, None] = {}
    readers = (
        partial(chunks_of, source, START._replace(source=n), settings) for n, source in enumerate(sources)
    )
    for chunk in ReadAhead(readers, 1, threading.Event()):
        for _, text, problem in records_of(chunk, settings.text_field, settings.cutting, fields):
            unread += bool(problem)
            for part in _parts("" if problem else text):
                data = part.encode(errors="surrogatepass")
                text_bytes += len(data)
                key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
                if key >= bound or key in held or not is_unicode(part):
                    continue
                heapq.heappush(heap, (-key, len(data), part))
                held.add(key)
                size += len(data)
                while size > most_bytes and len(heap) > 1:  # what goes lowers the bound for all that comes
                    minus_key, length, _ = heapq.heappop(heap)
                    bound = -minus_key
                    held.remove(bound)
                    size -= length
        report(text_bytes)
    if not heap:
        names = (
            f"; records have the fields {', '.join(fields)}, not {settings.text_field!r}" if fields else ""
        )
        without = f" ({unread} records without)" if unread else ""
        raise ValueError(f"{', '.join(inputs)}: no text to sample{without}{names}")
    return Sample([text for _, _, text in sorted(heap, reverse=True)], size, text_bytes, unread)


def _parts(text: str) -> Iterator[str]:
    """Cut at white space after every `_PART` characters, so that no word is cut."""
    start = 0
    while start < len(text):
        end = start + _PART
        while end < len(text) and not text[end].isspace():
            end += 1
        if part := text[start:end].strip():
            yield part
        start = end
