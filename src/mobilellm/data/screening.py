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
from mobilellm.data.count_words import count_words
from mobilellm.data.encoder import Encoder
from mobilellm.data.near_duplicates import Bands, Signer
from mobilellm.data.quality import QualityRules, broken_rule
from mobilellm.data.records import is_unicode, records_of
from mobilellm.data.rejected import EXCERPT
from mobilellm.tokenizer import Tokenizer

NOT_UNICODE = "not Unicode"
EMPTY, TOO_SHORT, TOO_LONG = "empty", "too short", "too long"


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

    def examine(self, chunk: Chunk) -> Examined:
        settings = self._settings
        rejections: list[Rejection] = []
        fields: dict[str, None] = {}
        numbers: list[int] = []
        texts: list[str] = []
        for number, text, unread in records_of(chunk, settings.text_field, settings.cutting, fields):
            if problem := unread or self._problem(text):
                rejections.append(Rejection(number, problem, text[:EXCERPT]))
            else:
                numbers.append(number)
                texts.append(text)
        data = [text.encode() for text in texts]
        digests = [int.from_bytes(hashlib.sha256(each).digest()[:8], "big") for each in data]
        encoded = self._encoder.encode(data)
        counts = np.empty((len(texts), 3), dtype=np.int64)
        counts[:, 0] = encoded.tokens
        counts[:, 1] = [len(each) for each in data]
        counts[:, 2] = count_words(data)
        return Examined(
            tuple(fields),
            rejections,
            numbers,
            [text[:EXCERPT] for text in texts],
            np.array(digests, dtype=np.uint64),
            counts,
            encoded.ids.tobytes(),
            self._signer.digests_of_all(texts) if self._signer else None,
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
