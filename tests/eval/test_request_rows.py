"""Every request is asked once, of a row that begins with its tokens, and nothing is fed twice in vain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.eval.interface import Request
from mobilellm.eval.request_rows import batches_of, check, rows_of

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
REQUESTS = st.lists(st.builds(Request, IDS, IDS), max_size=12)


@given(REQUESTS)
def test_each_request_is_answered_once(requests: list[Request]) -> None:
    rows = rows_of(requests)
    seen = []
    for row in rows:
        for question in row.questions:
            for number in question.numbers:
                context, continuation = requests[number]
                fed = context + continuation[:-1]
                assert row.tokens[: len(fed)] == fed
                assert (question.start, question.continuation) == (len(context) - 1, continuation)
                seen.append(number)
    assert sorted(seen) == list(range(len(requests)))


@given(REQUESTS)
def test_no_row_is_the_beginning_of_another(requests: list[Request]) -> None:
    rows = [row.tokens for row in rows_of(requests)]
    for i, row in enumerate(rows):
        assert not any(other[: len(row)] == row for j, other in enumerate(rows) if i != j)
    assert rows == sorted(rows, key=len, reverse=True)


@given(REQUESTS, st.integers(1, 30))
def test_batches_hold_so_many_tokens(requests: list[Request], tokens_at_once: int) -> None:
    rows = rows_of(requests)
    batches = list(batches_of(rows, tokens_at_once))
    assert [row for batch in batches for row in batch] == rows
    for batch, following in zip(batches, [*batches[1:], None], strict=False):
        width = len(batch[0].tokens)
        assert len(batch) == 1 or width * len(batch) <= tokens_at_once
        assert following is None or width * (len(batch) + 1) > tokens_at_once


def test_choices_of_one_token_share_a_row() -> None:
    question = (5, 6, 7)
    (row,) = rows_of([Request(question, (choice,)) for choice in (1, 2, 3, 2)] + [Request((5,), (6, 7))])
    assert row.tokens == question
    assert [each.numbers for each in row.questions] != []
    assert len(row.questions) == 4


def test_contexts_are_full_with_the_last_token() -> None:
    check([Request((0,) * 4, (1, 2))], context=5, vocabulary=3)
    with pytest.raises(ValueError, match="feeds 5 tokens and the model's context is 4"):
        check([Request((0,) * 4, (1, 2))], context=4, vocabulary=3)
