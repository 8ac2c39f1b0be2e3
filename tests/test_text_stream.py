"""Streaming against decoding everything at once, for any text, any split and any stop strings."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mobilellm.text_stream import TextStream
from mobilellm.tokenizer import Tokenizer


class Chunks:
    """Token i adds the i-th chunk of bytes."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def token_bytes(self, id: int) -> bytes:
        return self.chunks[id]


def streamed(chunks: list[bytes], stop: list[str], first: bool = False) -> tuple[list[str], bool]:
    """What each push and the finish showed, and whether a stop string was met."""
    stream = TextStream(Chunks(chunks), stop, first)
    shown = [stream.push(index) for index in range(len(chunks))]
    return [*shown, stream.finish()], stream.stopped


def cut_at_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The definition, letter by letter: the stop string that is complete first; the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


@st.composite
def splits(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> list[bytes]:
    data = draw(source)
    places = draw(st.lists(st.integers(0, len(data)), max_size=12))
    edges = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


FEW_LETTERS = st.text(alphabet="ab ", max_size=30)
STOPS = st.lists(
    st.one_of(st.text(alphabet="ab ", min_size=1, max_size=4), st.text(min_size=1, max_size=2)), max_size=4
)
TEXT_BYTES = st.one_of(FEW_LETTERS, st.text()).map(str.encode)


@given(chunks=splits(st.one_of(TEXT_BYTES, st.binary())), stop=STOPS, first=st.booleans())
@example(chunks=[b"abc", b"d"], stop=["abcd", "bc"], first=False)
@example(chunks=[b"x", b"\xf0\x9f", b"\x99"], stop=["\ufffd"], first=False)
@example(chunks=[b" ", b" a"], stop=[" a"], first=True)
def test_the_parts_make_the_whole(chunks: list[bytes], stop: list[str], first: bool) -> None:
    whole = b"".join(chunks).decode("utf-8", errors="replace")
    expected, stopped = cut_at_stop(whole.removeprefix(" ") if first else whole, stop)
    shown, met = streamed(chunks, stop, first)
    assert "".join(shown) == expected
    assert met is stopped


@given(chunks=splits(TEXT_BYTES))
def test_text_is_shown_as_soon_as_its_characters_are_whole(chunks: list[bytes]) -> None:
    shown, _ = streamed(chunks, [])
    for count in range(len(chunks)):
        so_far = b"".join(chunks[: count + 1])
        assert "".join(shown[: count + 1]) == so_far.decode("utf-8", errors="ignore")


@given(chunks=splits(FEW_LETTERS.map(str.encode)), stop=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(chunks: list[bytes], stop: list[str]) -> None:
    shown, _ = streamed(chunks, stop)
    for count in range(len(chunks)):
        text, stopped = cut_at_stop(b"".join(chunks[: count + 1]).decode(), stop)
        held = text[len("".join(shown[: count + 1])) :]
        if stopped:
            assert held == ""
            return
        begun = [
            text[-n:]
            for word in stop
            for n in range(1, len(word))
            if n <= len(text) and text.endswith(word[:n])
        ]
        assert held == max(begun, key=len, default="")


@given(text=st.text(), stop=STOPS)
def test_a_real_tokenizer_streams_what_it_decodes(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ids = tokenizer.encode(text, eos=True)
    stream = TextStream(tokenizer, stop, first=True)
    shown = "".join([stream.push(index) for index in ids]) + stream.finish()
    assert (shown, stream.stopped) == cut_at_stop(tokenizer.decode(ids), stop)


def test_ids_that_continue_a_text_keep_their_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world", bos=False)
    for first, expected in ((False, " hello world"), (True, "hello world")):
        stream = TextStream(tokenizer, first=first)
        assert "".join([stream.push(index) for index in ids]) + stream.finish() == expected


def test_nothing_comes_after_the_stop() -> None:
    stream = TextStream(Chunks([b"one st", b"op two", b"three"]), ["stop"])
    assert [stream.push(0), stream.stopped] == ["one ", False]
    assert [stream.push(1), stream.stopped] == ["", True]
    assert [stream.push(2), stream.finish(), stream.stopped] == ["", "", True]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="list of strings"):
        TextStream(Chunks([]), "stop")
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(Chunks([]), ["a", ""])
    stream = TextStream(Chunks([b"a\xc3"]))
    assert stream.push(0) + stream.finish() == "a\ufffd"
    assert stream.finish() == ""
    with pytest.raises(ValueError, match="finished"):
        stream.push(0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hello world, hello whole world of words " * 3], 285)
