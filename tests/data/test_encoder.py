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
from mobilellm.data import words as words_module
from mobilellm.data.cuts import Cuts
from mobilellm.data.encoder import Encoder
from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE
from mobilellm.tokenizer import Tokenizer
from mobilellm.tokenizer_merges import merges_of
from tokenizer_oracles import HARD_TEXTS, TEXTS, small, trained


def ids(encoder: Encoder, *texts: str) -> list[list[int]]:
    encoded = encoder.encode([text.encode() for text in texts])
    assert encoded.ids.dtype == encoder.dtype
    assert encoded.tokens.sum() == len(encoded.ids)
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.tokens)[:-1])] if texts else []


@cache
def encoder_of(name: str) -> tuple[Encoder, Tokenizer]:
    tokenizer = {"trained": trained, "small": small}[name]()
    return Encoder(tokenizer), tokenizer


@pytest.mark.parametrize("name", ["trained", "small"])
def test_hard_texts(name: str) -> None:
    encoder, tokenizer = encoder_of(name)
    for text in HARD_TEXTS:
        assert ids(encoder, text) == [tokenizer.encode(text, eos=True)], repr(text)
    assert ids(encoder, *HARD_TEXTS) == tokenizer.encode_batch(HARD_TEXTS, eos=True)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=5), st.sampled_from(["trained", "small"]), st.integers(1, 60))
def test_any_text(texts: list[str], name: str, segment: int) -> None:
    encoder, tokenizer = encoder_of(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "_SEGMENT", segment)
        assert ids(encoder, *texts) == tokenizer.encode_batch(texts, eos=True)
    assert ids(encoder, *texts) == tokenizer.encode_batch(texts, eos=True)  # now out of the table


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.text(alphabet=f"ab{SPACE}\n中文é🙂", min_size=2, max_size=4), max_size=12, unique=True),
    st.booleans(),
    st.lists(st.text(alphabet=f" ab\n{SPACE}é中文🙂字", max_size=40), min_size=1, max_size=4),
)
def test_any_vocabulary(ranked: list[str], with_break: bool, texts: list[str]) -> None:
    """Also those whose pieces reach over spaces and line breaks: then text is cut less, or not at all."""
    ranked = [piece for piece in ranked if with_break or "\n" not in piece]
    pieces = [*LAYOUT_HEAD, *ranked, SPACE, *"ab中文é🙂", *(["\n"] if with_break else [])]
    tokenizer = Tokenizer(pieces, merges_of(ranked, pieces))
    encoder = Encoder(tokenizer)
    assert ids(encoder, *texts) == tokenizer.encode_batch(texts, eos=True)


def parts(tokenizer: Tokenizer, text: str) -> list[str]:
    data = text.encode()
    begins = np.flatnonzero(Cuts(tokenizer).begins(data + bytes(4), 0, len(data))).tolist()
    return [data[begin:end].decode() for begin, end in zip(begins, [*begins[1:], len(data)], strict=True)]


@pytest.mark.parametrize("name", ["trained", "small"])
def test_usual_vocabularies_cut_words(name: str) -> None:
    tokenizer = encoder_of(name)[1]
    found = parts(tokenizer, " the thing\n\nthe 12")
    assert found[0] == " the"
    assert found[-6:] == ["\n", "\n", "the", " ", "1", "2"]
    assert parts(tokenizer, "🙂é中文") == ["🙂", "é", "中", "文"]


@pytest.mark.parametrize(
    ("ranked", "text", "expected"),
    [
        (["ab", f"{SPACE}a", f"{SPACE}ab"], "ab  ba", ["ab", " ", " ", "b", "a"]),
        ([f"b{SPACE}", f"ab{SPACE}"], "ab ba", ["ab ", "b", "a"]),
        ([SPACE * 2, f"{SPACE * 2}a"], "a  a b", ["a", "  a", " ", "b"]),
        (["\n\n"], "a\n\nb", ["a", "\n\n", "b"]),
        (["a\nb", "a\n"], "a\nb\na", ["a\nb", "\n", "a"]),
        (["中文", "文字"], "中文字中字文", ["中文字", "中", "字", "文"]),
        (["é中", "éa"], "éa中é中aé", ["éa", "中", "é中", "a", "é"]),
        (["🙂a", "a🙂"], "🙂🙂a🙂é", ["🙂", "🙂a🙂", "é"]),
    ],
    ids=repr,
)
def test_where_a_vocabulary_lets_text_be_cut(ranked: list[str], text: str, expected: list[str]) -> None:
    pieces = [*LAYOUT_HEAD, *ranked, SPACE, *"ab\n中文字é🙂"]
    assert parts(Tokenizer(pieces, merges_of(ranked, pieces)), text) == expected


def test_a_vocabulary_that_merges_bytes() -> None:
    pieces = [*LAYOUT_HEAD, "<0x0A>a", SPACE, "a"]
    tokenizer = Tokenizer(pieces, [("<0x0A>", "a")])
    assert not Cuts(tokenizer).anywhere
    assert parts(tokenizer, "a a\n") == ["a a\n"]
    assert ids(Encoder(tokenizer), "a\na a\n", "", "b") == tokenizer.encode_batch(
        ["a\na a\n", "", "b"], eos=True
    )


def test_a_table_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_MOST_WORDS", 100)
    monkeypatch.setattr(words_module, "_MOST_LONG_WORDS", 3)
    monkeypatch.setattr(words_module, "_SLOTS", 1024)
    tokenizer = trained()
    encoder = Encoder(tokenizer)
    for turn in range(6):
        texts = [
            " ".join(f"word{i % 7} {turn}{i} averyveryverylongword{i % 5}{turn}" for i in range(400))
        ] * 2
        assert ids(encoder, *texts) == tokenizer.encode_batch(texts, eos=True)
        assert encoder._words._count < 600


def test_words_that_differ_in_zeros_and_ends_alone() -> None:
    encoder, tokenizer = encoder_of("trained")
    stem = "abcdefghijklmnopqrstuvwxyz"
    texts = [stem[:size] + zeros for size in range(20) for zeros in ("", "\0", "\0\0", "\0" * 16)]
    for _ in range(2):
        assert ids(encoder, *texts, " ".join(texts)) == tokenizer.encode_batch(
            [*texts, " ".join(texts)], eos=True
        )


def test_one_word_longer_than_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "_SEGMENT", 64)
    encoder, tokenizer = encoder_of("trained")
    texts = ["x" * 1000 + " y", "a b " * 100, "", "z" * 63, "é" * 500, " " * 300]
    assert ids(encoder, *texts) == tokenizer.encode_batch(texts, eos=True)


def test_the_widest_number_type() -> None:
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 100)]
    filler = [f"{a}{b}" for a in letters for b in range(700)]
    tokenizer = Tokenizer([*LAYOUT_HEAD, SPACE, *filler, *letters], [])
    encoder = Encoder(tokenizer)
    assert encoder.dtype == np.dtype("<u4")
    assert ids(encoder, letters[-1]) == [tokenizer.encode(letters[-1], eos=True)]


def test_the_official_vocabulary_on_real_text(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer" / "llama_sp_32k.tokenizer.model")
    encoder = Encoder(tokenizer)
    texts = (shared / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8").split("\n = ")
    with lzma.open(shared / "corpus" / "childrens_stories_ccby.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts += [json.loads(line)["text"] for line in lines]
    assert ids(encoder, *texts) == tokenizer.encode_batch(texts, eos=True)
