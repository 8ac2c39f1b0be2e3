"""Ids, bytes and text: the same as the sentencepiece library, and back again."""

from __future__ import annotations

import bz2
import json
import lzma
import pickle
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mobilellm.sentencepiece_model import SPACE
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer
from mobilellm.tokenizer_files import backend
from tokenizer_oracles import (
    HARD_TEXTS,
    NORMAL,
    TEXTS,
    model_bytes,
    oracle,
    run_python,
    small,
    small_model,
    stored,
    trained,
)


@pytest.fixture(scope="module")
def llama_model(shared: Path) -> Path:
    return shared / "tokenizer" / "llama_sp_32k.tokenizer.model"


@pytest.fixture(scope="module")
def llama(llama_model: Path) -> Tokenizer:
    return Tokenizer.from_sentencepiece(llama_model)


def real_texts(data: Path) -> Iterator[str]:
    """A few megabytes of every kind of real text there is: whole documents, lines, fields of records."""
    for path in sorted(data.rglob("*")):
        if path.suffix in (".txt", ".raw", ".tokens", ".md"):
            text = path.read_text(encoding="utf-8")
            yield text[:100_000]
            yield from text.splitlines(keepends=True)[::80]
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines()
            yield "\n".join(lines)[:100_000]
            yield from lines[::40]
        elif path.suffix in (".xz", ".bz2"):
            with (lzma if path.suffix == ".xz" else bz2).open(path, "rt", encoding="utf-8") as file:
                for line in islice(file, 2 if "books" in path.name else 100):
                    yield json.loads(line)["text"][:100_000] if ".jsonl" in path.name else line


def test_real_text_gets_the_ids_that_sentencepiece_gives(
    llama: Tokenizer, llama_model: Path, shared: Path
) -> None:
    texts = list(real_texts(shared))
    assert len(texts) > 2_000
    ours, theirs = llama.encode_batch(texts, bos=False), oracle(llama_model).encode(texts)
    wrong = [text for text, mine, other in zip(texts, ours, theirs, strict=True) if mine != other]
    assert not wrong, f"{len(wrong)} of {len(texts)}, first {wrong[0][:200]!r}"
    assert [llama.decode(ids) for ids in ours] == [text.replace(SPACE, " ") for text in texts]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_text_gets_the_ids_that_sentencepiece_gives(
    llama: Tokenizer, llama_model: Path, text: str
) -> None:
    assert llama.encode(text, bos=False) == oracle(llama_model).encode(text)


@given(text=TEXTS)
@settings(max_examples=400, deadline=None)
def test_any_text_gets_the_ids_that_sentencepiece_gives(
    llama: Tokenizer, llama_model: Path, text: str
) -> None:
    assert llama.encode(text, bos=False) == oracle(llama_model).encode(text)


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_a_model_that_sentencepiece_trained_is_reproduced(text: str) -> None:
    assert small().encode(text, bos=False) == oracle(small_model()).encode(text)


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_scores_make_sentencepiece_encode_as_a_trained_tokenizer_does(
    text: str,
) -> None:
    assert trained().encode(text, bos=False) == oracle(trained_model()).encode(text)


@cache
def trained_model() -> Path:
    """The trained tokenizer as a tokenizer.model, told by its scores alone."""
    ordinary = zip(trained().pieces[259:], trained().scores()[259:], strict=True)
    return stored(model_bytes([(piece, score, NORMAL) for piece, score in ordinary]))


def test_scores_are_refused_where_merges_are_missing() -> None:
    pieces = ["".join(merge) for merge in trained().merges]
    second_way = next(index for index, piece in enumerate(pieces) if piece in pieces[:index])
    fewer = Tokenizer(trained().pieces, trained().merges[:second_way] + trained().merges[second_way + 1 :])
    with pytest.raises(ValueError, match="scores cannot say"):
        fewer.scores()


def test_special_ids_are_fixed() -> None:
    assert (UNK_ID, BOS_ID, EOS_ID, PAD_ID) == (0, 1, 2, 0)
    assert trained().pieces[:3] == ("<unk>", "<s>", "</s>")
    assert trained().encode("") == [BOS_ID]
    assert trained().encode("", bos=False) == []
    plain = trained().encode("some text", bos=False)
    assert trained().encode("some text", eos=True) == [BOS_ID, *plain, EOS_ID]
    assert trained().encode("some text", bos=False, eos=True) == [*plain, EOS_ID]
    assert trained().decode([BOS_ID, *plain, EOS_ID]) == "some text"
    assert trained().decode([BOS_ID, *plain, EOS_ID], skip_special=False) == "<s> some text</s>"


@given(text=TEXTS)
@settings(deadline=None)
@example("</s><s><unk><0x41>")
def test_text_never_becomes_a_special_id(text: str) -> None:
    assert not {UNK_ID, BOS_ID, EOS_ID} & set(trained().encode(text, bos=False))


def test_text_never_becomes_a_special_id_after_pickling() -> None:
    copy = pickle.loads(pickle.dumps(trained()))
    assert copy.encode("a </s> <s>") == trained().encode("a </s> <s>")
    assert copy.fingerprint == trained().fingerprint


@given(text=TEXTS)
@settings(deadline=None)
def test_decoding_gives_the_text_back(text: str) -> None:
    # A typed U+2581 is the sign for a space and comes back as one, in SentencePiece too.
    assert trained().decode(trained().encode(text, eos=True)) == text.replace(SPACE, " ")


@given(text=TEXTS)
@settings(deadline=None)
def test_token_bytes_add_up_to_the_text_with_a_space_in_front(text: str) -> None:
    ids = trained().encode(text, eos=True)
    whole = b"".join(trained().token_bytes(index) for index in ids)
    assert whole == (" " + text if text else "").replace(SPACE, " ").encode()


@given(text=TEXTS)
@settings(deadline=None)
@example("naïve 中 🙂▁ x")
def test_starts_cut_the_text_into_what_each_token_spells(text: str) -> None:
    ids, starts = trained().encode_with_starts(text)
    assert ids == trained().encode(text, bos=False)
    assert starts == sorted(starts)
    parts = [text[a:b] for a, b in pairwise([*starts, len(text)])]
    assert "".join(parts) == text
    for place, (index, part) in enumerate(zip(ids, parts, strict=True)):
        spelled = trained().token_bytes(index)
        if index < 259:  # one of the bytes that spell a character, which then goes to the last of them
            assert not part or part.encode().endswith(spelled)
        elif place == 0:
            assert f" {part}".replace(SPACE, " ").encode() == spelled
        else:
            assert part.replace(SPACE, " ").encode() == spelled


@given(text=TEXTS)
@settings(deadline=None)
def test_starts_are_the_offsets_of_the_tokenizers_library(text: str) -> None:
    ids, starts = trained().encode_with_starts(text)
    library = backend(trained().pieces, trained().merges).encode(text, add_special_tokens=False)
    whole = [index for index, id in enumerate(ids) if id >= 259 and index > 0]
    assert [starts[index] for index in whole] == [library.offsets[index][0] for index in whole]


def test_token_bytes_of_bytes_and_specials() -> None:
    assert [trained().token_bytes(index) for index in range(3)] == [b"", b"", b""]
    assert b"".join(trained().token_bytes(index) for index in range(3, 259)) == bytes(range(256))


@given(ids=st.lists(st.integers(3, 258), max_size=12))
def test_bytes_that_are_no_text_decode_as_python_decodes_them(ids: list[int]) -> None:
    data = bytes(index - 3 for index in ids)
    assert trained().decode(ids) == data.decode("utf-8", errors="replace").removeprefix(" ")


@given(texts=st.lists(TEXTS, max_size=8), bos=st.booleans(), eos=st.booleans())
@settings(deadline=None)
def test_a_batch_is_its_texts_one_by_one(texts: list[str], bos: bool, eos: bool) -> None:
    assert trained().encode_batch(texts, bos, eos) == [trained().encode(text, bos, eos) for text in texts]


def test_what_is_no_text_or_no_id_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"text 0 .* lone surrogate '\\ud83d' at character 2"):
        trained().encode("ab\ud83d")
    with pytest.raises(ValueError, match="text 1 is int, not str"):
        trained().encode_batch(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="list of texts"):
        trained().encode_batch("ab")
    for index in (-1, trained().vocab_size):
        with pytest.raises(ValueError, match=f"token id {index} is outside the vocabulary of 700"):
            trained().decode([5, index])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            trained().token_bytes(index)


def test_importing_the_tokenizer_brings_in_nothing_heavy() -> None:
    loaded = run_python(
        "import sys, mobilellm.tokenizer, mobilellm.text_stream; print(*sys.modules)", {}
    ).split()
    assert not {"numpy", "torch", "transformers", "sentencepiece", "google.protobuf"} & set(loaded)
