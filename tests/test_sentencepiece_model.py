"""Reading tokenizer.model files: other kinds, damaged ones, and what cannot be reproduced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.sentencepiece_model import SPACE, SentencePieceModel, read_sentencepiece_model
from mobilellm.tokenizer import Tokenizer
from tokenizer_oracles import (
    NORMAL,
    UNUSED,
    USER_DEFINED,
    model_bytes,
    oracle,
    sentencepiece_model,
    small_model,
    stored,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "is a unigram model; only bpe"),
        ({"model_type": "char"}, "is a char model"),
        ({"byte_fallback": False}, "no byte_fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normaliser 'nmt_nfkc'; only identity"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=true"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix=false"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
        ({"user_defined_symbols": ["<sep>"]}, "piece 3 is '<sep>'"),
        ({"control_symbols": ["<pad>"]}, "piece 3 is '<pad>'"),
        ({"unk_id": 1, "bos_id": 0}, "piece 0 is '<s>'; a Llama-style vocabulary has '<unk>' there"),
        ({"pad_id": 3}, "piece 3 is '<pad>'"),
        ({"bos_id": -1}, "piece 1 is '<0x00>'; a Llama-style vocabulary has '<s>' there"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model(**changes))
    with pytest.raises(ValueError, match=message) as refused:
        Tokenizer.load(tmp_path)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


ORDINARY = [(SPACE, -9.0, NORMAL), ("a", -10.0, NORMAL), ("b", -11.0, NORMAL)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("ab", -1.0, UNUSED)], "piece 262 'ab' is unused"),
        ([("ab", -1.0, USER_DEFINED)], "piece 262 'ab' is user-defined"),
        ([("ab", -1.0, 9)], "piece 262 'ab' is type-9"),
        ([("a", -1.0, NORMAL)], "piece 262 'a' is given twice"),
        ([("", -1.0, NORMAL)], "piece 262 '' is empty"),
        ([("ab", float("nan"), NORMAL)], "no score"),
        ([("ac", -1.0, NORMAL)], "piece 'ac' has the character 'c', which is no piece"),
        ([("ab", -1.0, NORMAL), ("ba", -1.0, NORMAL)], "pieces 'ab' and 'ba' have the same score -1"),
        ([(SPACE * 2, -1.0, NORMAL), (SPACE * 4, -1.0, NORMAL)], "have the same score"),
    ],
)
def test_pieces_that_cannot_be_reproduced_are_refused(
    tmp_path: Path, entries: list[tuple[str, float, int]], message: str
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model_bytes(ORDINARY))
    assert Tokenizer.load(file).encode("a b", bos=False) == [259, 260, 259, 261]
    file.write_bytes(model_bytes(ORDINARY + entries))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(file)


@given(longest=st.integers(2, 7), text=st.text(alphabet=" ab", max_size=40))
@settings(deadline=None, max_examples=200)
def test_runs_of_spaces_with_one_score_grow_from_the_left(longest: int, text: str) -> None:
    runs = [(SPACE * length, -99.0, NORMAL) for length in range(2, longest + 1)]
    words = [
        (SPACE + "a", -1.0, NORMAL),
        ("ab", -2.0, NORMAL),
        (SPACE + "ab", -3.0, NORMAL),
        ("bb", -4.0, NORMAL),
    ]
    file = stored(model_bytes(ORDINARY + runs + words))
    assert Tokenizer.from_sentencepiece(file).encode(text, bos=False) == oracle(file).encode(text)


def test_every_truncation_of_a_model_is_noticed(tmp_path: Path) -> None:
    whole = model_bytes([*ORDINARY, ("ab", -1.0, NORMAL)])
    assert read_bytes(tmp_path, whole).ranked == ("ab",)
    for length in [*range(0, len(whole), 11), *range(len(whole) - 60, len(whole))]:
        with pytest.raises(ValueError, match=r"cut\.model: ") as refused:
            read_bytes(tmp_path, whole[:length])
        assert "\n" not in str(refused.value)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_models_raise_nothing_but_value_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(small_model().read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Early bytes hold the special pieces, late ones the settings.
        end = data.draw(st.sampled_from([100, len(damaged)]))
        damaged[data.draw(st.integers(end - 100, end - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in refusal(tmp_path_factory.getbasetemp(), bytes(damaged))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"<html></html>",
        b"PK\x03\x04",
        b"GGUF\x03\x00\x00\x00",
        b"\x0a\xff\xff\xff",
        b"\xff" * 40,
        b"\x08" + b"\x80" * 30,
    ],
)
def test_files_that_are_no_model_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut\.model: not a (whole )?SentencePiece model"):
        read_bytes(tmp_path, content)


def refusal(directory: Path, content: bytes) -> str:
    """Why a file is refused; "" if it is not. Anything but a ValueError comes through."""
    try:
        read_bytes(directory, content)
    except ValueError as error:
        return str(error)
    return ""


def read_bytes(directory: Path, content: bytes) -> SentencePieceModel:
    file = directory / "cut.model"
    file.write_bytes(content)
    return read_sentencepiece_model(file)
