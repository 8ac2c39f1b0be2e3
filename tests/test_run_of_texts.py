"""Texts in one run of bytes are the texts they were made of, and each is found again."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.texts import Texts

MANY = st.lists(st.text(st.characters(codec="utf-8"), max_size=200), max_size=30)


def of_bytes(*encoded: bytes) -> Texts:
    """As a file has them, whatever they are."""
    data, bounds = b"", [0]
    for each in encoded:
        data += struct.pack("<Q", len(each)) + each
        bounds.append(len(data))
    return Texts(data, array("q", bounds))


@given(texts=MANY, other=st.text(st.characters(codec="utf-8"), max_size=4))
def test_what_goes_in_is_there_and_is_found(texts: list[str], other: str) -> None:
    kept = Texts.of(texts)
    assert list(kept) == [kept[place] for place in range(len(kept))] == kept[:] == texts
    assert kept.first(len(texts) // 2)[:] == texts[: len(texts) // 2]
    assert kept.are_utf8()
    assert kept.repeats() == (len(set(texts)) < len(texts))
    for text in (*texts, other):
        found = kept.find(text.encode())
        assert text not in texts if found is None else texts[found] == text
    assert kept.of_more_than(5) == [text for text in texts if len(text.encode()) > 5]


@given(encoded=st.lists(st.binary(max_size=6), max_size=6), long=st.booleans())
def test_what_is_no_text_is_noticed(encoded: list[bytes], long: bool) -> None:
    if long:
        encoded = [*encoded, bytes(200)]
    right = all(each.decode(errors="ignore").encode() == each for each in encoded)
    assert of_bytes(*encoded).are_utf8() == right


def test_a_character_cut_in_two_by_the_length_of_the_next_text_is_noticed() -> None:
    assert b"\xc3\xa9".decode() == "é"
    assert not of_bytes(b"\xc3", bytes(0xA9)).are_utf8()


def test_places_outside_and_lone_surrogates_are_refused() -> None:
    with pytest.raises(IndexError):
        Texts.of(["a"])[1]
    assert Texts.of(["a", "b"])[-1] == "b"
    with pytest.raises(UnicodeEncodeError):
        Texts.of(["\ud800"])


def test_in_another_process_they_are_found_too() -> None:
    kept = Texts.of(["one", "two", "three"])
    assert kept.find(b"three") == 2
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).find(b'three'))"
    for seed in ("1", "2"):  # of the hashes there
        done = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(kept), capture_output=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout == b"2\n"
