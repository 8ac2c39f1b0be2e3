"""From a chunk of input to token ids: find its documents, reject what is no document, encode the others.

Everything here looks at one document at a time, so it runs in any worker; what needs the whole corpus
(duplicates, the split) is left to `mobilellm.data.prepare`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.chunks import Chunk, Cutting
from mobilellm.data.encoder import Encoder
from mobilellm.data.near_duplicates import Bands, Signer
from mobilellm.data.quality import QualityRules, broken_rule
from mobilellm.data.records import is_unicode, records_of
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer

NOT_UNICODE = "not Unicode"
EMPTY, TOO_SHORT, TOO_LONG = "empty", "too short", "too long"

_EXCERPT = 80


class ScreenSettings(NamedTuple):
    """How documents are found and judged. `min_characters` and `max_characters` are inclusive."""

    text_field: str = "text"
    cutting: Cutting = Cutting()
    min_characters: int = 0
    max_characters: int | None = None
    quality: QualityRules | None = None
    bands: Bands | None = None


class Rejection(NamedTuple):
    number: int  # line or row
    reason: str
    text: str  # its first characters


class Examined(NamedTuple):
    """What a chunk holds. Lists and the rows of arrays are parallel, one for each document that passed.

    `ids` are the bytes of all their tokens, BOS and EOS included. `fields` are names seen in records without
    the text field.
    """

    records: int
    fields: tuple[str, ...]
    rejections: list[Rejection]
    numbers: list[int]
    excerpts: list[str]
    digests: NDArray[np.uint64]  # the first eight bytes of the text's sha256, big-endian
    counts: NDArray[np.int64]  # (documents, 3): tokens, UTF-8 bytes, words
    ids: bytes
    bands: NDArray[np.uint64] | None  # (documents, bands)


class Screen:
    """Examines chunks. One for each process: it keeps a cache of words."""

    def __init__(self, settings: ScreenSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._encoder = Encoder(tokenizer)
        self._signer = Signer(settings.bands) if settings.bands else None
        self._before, self._after = (np.array([i], self._encoder.dtype).tobytes() for i in (BOS_ID, EOS_ID))

    def examine(self, chunk: Chunk) -> Examined:
        rejections: list[Rejection] = []
        fields: dict[str, None] = {}
        numbers: list[int] = []
        excerpts: list[str] = []
        digests: list[int] = []
        counts: list[tuple[int, int, int]] = []
        parts: list[bytes] = []
        bands: list[NDArray[np.uint64]] = []
        records = 0
        for number, text, unread in records_of(
            chunk, self._settings.text_field, self._settings.cutting, fields
        ):
            records += 1
            excerpt = text[:_EXCERPT]
            if problem := unread or self._problem(text):
                rejections.append(Rejection(number, problem, excerpt))
                continue
            data = text.encode()
            ids = self._encoder.encode(text)
            parts += (self._before, ids, self._after)
            numbers.append(number)
            excerpts.append(excerpt)
            digests.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big"))
            counts.append((len(ids) // self._encoder.dtype.itemsize + 2, len(data), len(text.split())))
            if self._signer:
                bands.append(self._signer.digests(text))
        return Examined(
            records,
            tuple(fields),
            rejections,
            numbers,
            excerpts,
            np.array(digests, dtype=np.uint64),
            np.array(counts, dtype=np.int64).reshape(-1, 3),
            b"".join(parts),
            np.array(bands, dtype=np.uint64).reshape(len(numbers), -1) if self._signer else None,
        )

    def _problem(self, text: str) -> str:
        settings, problem = self._settings, ""
        if not is_unicode(text):
            problem = NOT_UNICODE
        elif not text or text.isspace():
            problem = EMPTY
        elif len(text) < settings.min_characters:
            problem = TOO_SHORT
        elif settings.max_characters is not None and len(text) > settings.max_characters:
            problem = TOO_LONG
        elif settings.quality is not None and (rule := broken_rule(text, settings.quality)):
            problem = f"quality: {rule}"
        return problem


def counted(rejections: Mapping[str, int], more: list[Rejection]) -> dict[str, int]:
    """Rejections by reason, with `more` of them."""
    return dict(Counter(rejections) + Counter(rejection.reason for rejection in more))
