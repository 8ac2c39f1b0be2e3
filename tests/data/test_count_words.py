"""Words are counted as `str.split` counts them, for every character there is."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from mobilellm.data.count_words import count_words

SPACES = [chr(code) for code in range(sys.maxunicode) if chr(code).isspace()]


@given(
    st.lists(
        st.one_of(
            st.text(),
            st.lists(st.sampled_from([*SPACES, "a", "é", "\u2010", "\u2080", "\u00a1", "中"])).map("".join),
        )
    )
)
def test_as_split_counts(texts: list[str]) -> None:
    assert count_words([text.encode() for text in texts]).tolist() == [len(text.split()) for text in texts]


def test_every_character() -> None:
    texts = [f"a{chr(code)}b" for code in range(sys.maxunicode) if not 0xD800 <= code < 0xE000]
    assert count_words([text.encode() for text in texts]).tolist() == [len(text.split()) for text in texts]
