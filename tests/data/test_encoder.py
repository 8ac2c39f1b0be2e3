"""The fast encoder gives the ids of the tokenizer, whatever the vocabulary and the text."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data import encoder as encoder_module
from mobilellm.data.encoder import Encoder, cuts
from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE
from mobilellm.tokenizer import Tokenizer, merges_of
from tokenizer_oracles import HARD_TEXTS, TEXTS, small, trained


def ids(encoder: Encoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode(text), dtype=encoder.dtype).tolist()  # type: ignore[no-any-return]


@cache
def encoder_of(name: str) -> tuple[Encoder, Tokenizer]:
    tokenizer = {"trained": trained, "small": small}[name]()
    return Encoder(tokenizer), tokenizer


@pytest.mark.parametrize("name", ["trained", "small"])
def test_hard_texts(name: str) -> None:
    encoder, tokenizer = encoder_of(name)
    assert cuts(tokenizer) == (True, True)
    for text in HARD_TEXTS:
        assert ids(encoder, text) == tokenizer.encode(text, bos=False), repr(text)


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.sampled_from(["trained", "small"]))
def test_any_text(text: str, name: str) -> None:
    encoder, tokenizer = encoder_of(name)
    assert ids(encoder, text) == tokenizer.encode(text, bos=False)
    assert ids(encoder, text) == tokenizer.encode(text, bos=False)  # now out of the cache


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.text(alphabet=f"ab{SPACE}\n", min_size=2, max_size=4), max_size=12, unique=True),
    st.booleans(),
    st.lists(st.text(alphabet=f" ab\n{SPACE}é", max_size=40), min_size=1, max_size=4),
)
def test_any_vocabulary(ranked: list[str], with_break: bool, texts: list[str]) -> None:
    """Also those whose pieces reach over spaces and line breaks: then text is cut less, or not at all."""
    ranked = [piece for piece in ranked if with_break or "\n" not in piece]
    pieces = [*LAYOUT_HEAD, *ranked, SPACE, "a", "b", *(["\n"] if with_break else [])]
    tokenizer = Tokenizer(pieces, merges_of(ranked, pieces))
    encoder = Encoder(tokenizer)
    for text in texts:
        assert ids(encoder, text) == tokenizer.encode(text, bos=False), repr(text)


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        (["ab", f"{SPACE}a", SPACE * 2, f"{SPACE * 2}ab"], (True, True)),
        (["ab", f"b{SPACE}"], (False, True)),
        ([f"a{SPACE}b", f"a{SPACE}"], (False, True)),
        (["\n\n"], (True, False)),
        (["a\n"], (True, False)),
        (["\nb"], (True, False)),
        ([f"\n{SPACE}"], (False, False)),
    ],
    ids=repr,
)
def test_where_a_vocabulary_lets_text_be_cut(ranked: list[str], expected: tuple[bool, bool]) -> None:
    pieces = [*LAYOUT_HEAD, *ranked, SPACE, "a", "b", "\n"]
    assert cuts(Tokenizer(pieces, merges_of(ranked, pieces))) == expected


def test_a_merge_of_the_byte_of_a_line_break() -> None:
    pieces = [*LAYOUT_HEAD, "<0x0A>a", SPACE, "a"]
    tokenizer = Tokenizer(pieces, [("<0x0A>", "a")])
    assert cuts(tokenizer) == (True, False)
    assert ids(Encoder(tokenizer), "a\na a\n") == tokenizer.encode("a\na a\n", bos=False)


def test_a_cache_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "_CACHED_WORDS", 5)
    tokenizer = trained()
    encoder = Encoder(tokenizer)
    text = " ".join(f"word{i % 7} the{i % 13} {i}" for i in range(200))
    for _ in range(3):
        assert ids(encoder, text) == tokenizer.encode(text, bos=False)
    assert len(encoder._spaced) <= 5


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encoder_of("trained")[0].encode("a \ud83d b")


def test_the_widest_number_type() -> None:
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 100)]
    filler = [f"{a}{b}" for a in letters for b in range(700)]
    tokenizer = Tokenizer([*LAYOUT_HEAD, SPACE, *filler, *letters], [])
    encoder = Encoder(tokenizer)
    assert encoder.dtype == np.dtype("<u4")
    assert ids(encoder, letters[-1]) == tokenizer.encode(letters[-1], bos=False)


def test_the_official_vocabulary_on_real_text(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer" / "llama_sp_32k.tokenizer.model")
    encoder = Encoder(tokenizer)
    texts = (shared / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8").split("\n = ")
    with lzma.open(shared / "corpus" / "childrens_stories_ccby.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts += [json.loads(line)["text"] for line in lines]
    for text, expected in zip(texts, tokenizer.encode_batch(texts, bos=False), strict=True):
        assert ids(encoder, text) == expected
