"""The tokenizer: byte-fallback BPE in the Llama layout, token for token what SentencePiece gives.

    pieces 0 1 2      <unk> <s> </s>
    pieces 3 .. 258   the bytes <0x00> .. <0xFF>, which spell what no piece covers
    pieces 259 ..     everything else, with a space written as ▁

A text is encoded as one word: a ▁ is put in front, every space becomes ▁, and pairs of pieces are merged in
the order of their rank. (A pre-tokenizer that splits before each run of ▁ gives the same ids and measured no
faster.) `encode` never makes a special id out of text: a typed "</s>" becomes ordinary pieces, as in
SentencePiece, so text cannot end or restart a document. Stock transformers does turn it into id 2, unless it
is loaded or called with `split_special_tokens=True`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE, SPECIAL_PIECES, read_sentencepiece_model
from mobilellm.short_text import ShortTexts
from mobilellm.texts import Texts
from mobilellm.tokenizer_files import (
    NORMALIZER,
    added_pieces,
    backend,
    config_repairs,
    json_disagreement,
    read_tokenizer_json,
    write_tokenizer_files,
)
from mobilellm.tokenizer_merges import Merge, check_merges, merges_of, scores_of

if TYPE_CHECKING:
    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
PAD_ID = UNK_ID  # never eos: masking the padding must not mask the end of a text; <unk> never appears in one

_SPACE_BYTES = SPACE.encode()
_MOST_SHORT_CHARACTERS = 2000
"""Encoded without the library: more would take longer than it takes to get ready."""


class Tokenizer:
    """Text to ids and back. Make one with `load`, `from_sentencepiece` or `train`.

    >>> tokenizer = Tokenizer.train(["the cat sat on the mat, the cat sat"], vocab_size=272)
    >>> ids = tokenizer.encode("the cat")
    >>> (ids[0] == BOS_ID, tokenizer.decode(ids))
    (True, 'the cat')

    `repairs` says in words what was wrong with the files it was loaded from and what was done about it.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        merges: Sequence[Merge] = (),
        repairs: Sequence[str] = (),
        ranked: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """With `ranked` in place of `merges`: ids of pieces that are made of others, in all ways there are.

        Then the library takes the vocabulary up only when more than a few short texts have been encoded.
        """
        self._texts = pieces if isinstance(pieces, Texts) else Texts.of(pieces)
        _check_vocabulary(self._texts)
        self.repairs = tuple(repairs)
        self._ranked, self._merges = ranked, tuple(merges) if ranked is None else None
        self._short = None if ranked is None else ShortTexts(self._texts, ranked)
        self._short_left = _MOST_SHORT_CHARACTERS
        if ranked is None:
            _ = self._backend

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, a tokenizer.model, or a directory with either or both.

        With both, the tokenizer.model is used, and a tokenizer.json that encodes differently is reported
        in `repairs`. Raises FileNotFoundError, or ValueError with one line naming the file and the fault.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
        if not path.is_dir():
            return cls._from_json(path) if path.suffix == ".json" else cls.from_sentencepiece(path)
        json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
        if not json_file.is_file() and not model_file.is_file():
            raise FileNotFoundError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
        repairs = config_repairs(path / "tokenizer_config.json")
        if not model_file.is_file():
            return cls._from_json(json_file, repairs)
        tokenizer = cls.from_sentencepiece(model_file)
        if json_file.is_file():
            extra = added_pieces(json_file)
            if extra:
                raise ValueError(
                    f"{json_file}: adds {extra[0]!r}, which tokenizer.model lacks; remove one of the two"
                )
            repairs += json_disagreement(json_file, lambda texts: tokenizer.encode_batch(texts, bos=False))
        tokenizer.repairs = tuple(repairs)
        return tokenizer

    @classmethod
    def _from_json(cls, path: Path, repairs: Sequence[str] = ()) -> Tokenizer:
        pieces, merges = read_tokenizer_json(path)
        try:
            return cls(pieces, merges, repairs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> Tokenizer:
        """From a Llama-style BPE tokenizer.model. Raises FileNotFoundError or ValueError (one line)."""
        model = read_sentencepiece_model(path)
        ids = {piece: index for index, piece in enumerate(model.pieces)}
        return cls(model.pieces, ranked=[ids[piece] for piece in model.ranked])

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        character_coverage: float = 0.9995,
        min_frequency: int = 2,
        max_piece_length: int = 16,
    ) -> Tokenizer:
        """A new tokenizer of exactly `vocab_size` pieces, the same for the same texts: see `train_pieces`."""
        from mobilellm.tokenizer_training import train_pieces  # which needs the library

        ranked, characters = train_pieces(
            texts, vocab_size, character_coverage, min_frequency, max_piece_length
        )
        first = len(LAYOUT_HEAD)
        return cls(LAYOUT_HEAD + ranked + characters, ranked=range(first, first + len(ranked)))

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """All pieces, in the order of their ids."""
        return tuple(self._texts)

    @property
    def merges(self) -> tuple[Merge, ...]:
        """Pairs of pieces, the pair to be joined first before the others."""
        if self._merges is None:
            assert self._ranked is not None
            self._merges = tuple(merges_of([self.pieces[index] for index in self._ranked], self.pieces))
        return self._merges

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        try:
            return backend(self.pieces, self.merges)
        except Exception:  # the library raises bare Exception, for merges of what is no piece
            check_merges(self.merges, self.pieces)
            raise

    @cached_property
    def _bytes(self) -> list[bytes]:
        return [self.token_bytes(index) for index in range(self.vocab_size)]

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over vocabulary, merges and normaliser: where it is equal, every text has the same ids."""
        import hashlib
        import json

        content = json.dumps([self.pieces, self.merges, NORMALIZER], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of `text`, which may hold anything but lone surrogates (ValueError). "" has none of its own."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True, eos: bool = False) -> list[list[int]]:
        """As `encode` for each text, several at a time on the threads of the tokenizers library."""
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a list of texts; encode takes one text")
        try:
            encoded = self._encode(list(texts))
        except (TypeError, AttributeError, UnicodeEncodeError):
            raise ValueError(_why_not_text(texts)) from None
        before, after = [BOS_ID] * bos, [EOS_ID] * eos
        return [before + ids + after for ids in encoded]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        short = self._short  # another thread may have done with it meanwhile
        if short is not None:
            self._short_left -= sum(map(len, texts))
            if self._short_left >= 0:
                return [short.encode(text) for text in texts]
            self._short = None
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` without BOS, and for each the index of the character where it begins.

        A token that begins inside a character, as the bytes that spell one do, begins where that character
        does; the space that encoding puts in front counts to the first character.
        """
        ids = self.encode(text, bos=False)
        character_of_byte = [0]
        for index, character in enumerate(text.replace(SPACE, " ")):
            character_of_byte += [index] * len(character.encode())
        starts, place = [], 0
        for token in ids:
            starts.append(character_of_byte[place])
            place += len(self._bytes[token])
        return ids, starts

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, less the one space that encoding put in front.

        Bytes that are no UTF-8 become U+FFFD, as `bytes.decode(errors="replace")` does it. Special ids
        leave nothing, or their names with `skip_special=False`.
        """
        table = self._bytes
        if not skip_special:
            table = [piece.encode() for piece in SPECIAL_PIECES] + table[len(SPECIAL_PIECES) :]
        data = b"".join(map(table.__getitem__, self._all_checked(ids)))
        return data.decode("utf-8", errors="replace").removeprefix(" ")

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token adds to running text: a space for ▁, one byte for <0xNN>, none for specials."""
        index = self._checked(id)
        if index < len(SPECIAL_PIECES):
            return b""
        if index < len(LAYOUT_HEAD):
            return bytes([index - len(SPECIAL_PIECES)])
        return self._texts.utf8(index).replace(_SPACE_BYTES, b" ")

    def num_bytes(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> int:
        """UTF-8 bytes of the text of whole documents, each with the BOS before it, in a stream of ids."""
        import numpy as np

        lengths = np.array([len(part) for part in self._bytes])
        counts = np.bincount(np.asarray(ids), minlength=self.vocab_size)
        spaces_in_front = int(counts[BOS_ID])  # which encoding put there
        return int((lengths * counts).sum()) - spaces_in_front

    def scores(self) -> tuple[float, ...]:
        """A SentencePiece score for each piece, such that merging by score gives the ids that `merges` give.

        Raises ValueError if scores cannot say it: see `tokenizer_merges.scores_of`.
        """
        return scores_of(self.merges, self.pieces)

    def save(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for us and transformers.

        Stock `AutoTokenizer` loads them as they are, puts <s> in front as `encode` does, and pads with
        <unk>. `model_max_length` is in tokens. Raises ValueError if a different tokenizer.model lies there,
        because `load` would go by that one.
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"{directory}: is a file; a tokenizer is saved in a directory")
        if model_max_length is not None and model_max_length < 1:
            raise ValueError(f"model_max_length is {model_max_length}; it is a number of tokens, at least 1")
        model_file = directory / "tokenizer.model"
        if model_file.is_file() and Tokenizer.from_sentencepiece(model_file).fingerprint != self.fingerprint:
            raise ValueError(f"{model_file}: belongs to another tokenizer; remove it or save elsewhere")
        write_tokenizer_files(directory, self.pieces, self.merges, model_max_length)

    def _all_checked(self, ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            for index in ids:
                self._checked(index)
        return ids

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size} pieces")
        return index


def _check_vocabulary(pieces: Texts) -> None:
    for index, expected in enumerate(LAYOUT_HEAD):
        if index >= len(pieces) or pieces[index] != expected:
            found = f"is {pieces[index]!r}" if index < len(pieces) else "is missing"
            raise ValueError(f"token {index} {found}; a Llama-style vocabulary has {expected!r} there")
    if pieces.repeats():
        raise ValueError("the vocabulary holds a piece twice")
    if pieces.find(_SPACE_BYTES) is None:
        raise ValueError(f"the vocabulary has no piece {SPACE!r} for a space")


def _why_not_text(texts: Sequence[object]) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {index} is {type(text).__name__}, not str"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{text[error.start]!r} at character {error.start}"
            return f"text {index} is no Unicode text: it has the lone surrogate {where}"
    raise AssertionError("the tokenizers library refused what is text")
