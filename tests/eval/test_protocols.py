from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_model import BOS, TableModel

from mobilellm.eval import protocols
from mobilellm.eval.texts import Document

TEXTS = st.text(st.sampled_from("ab é\n中 "), min_size=20, max_size=120)


def nats(model: TableModel, ids: list[int], start: int, end: int) -> float:
    """Of ids[start:end], each after the id before it."""
    return -sum(float(model.table[ids[i - 1], ids[i]]) for i in range(start, end))


def by_the_protocol(model: TableModel, text: str, window: int) -> float:
    """The reference's protocol straight from its description: mean over windows of the mean loss."""
    ids = model.encode([text])[0]
    count = len(ids) // window
    losses = []
    for i in range(count):
        part = ids[i * window : (i + 1) * window]
        losses.append(nats(model, part, 1, window) / (window - 1))
    return math.exp(sum(losses) / count)


@given(TEXTS, st.integers(2, 16), st.booleans())
@settings(max_examples=60, deadline=None)
def test_reference_is_the_published_protocol(text: str, window: int, adds_bos: bool) -> None:
    model = TableModel(16, adds_bos)
    results, items = protocols.score(model, protocols.reference(model, text, window))
    assert results["token_perplexity"] == pytest.approx(by_the_protocol(model, text, window), rel=1e-6)
    assert results["units"] == (len(text) + adds_bos) // window
    assert results["tokens"] == results["units"] * (window - 1)
    assert sum(items["nats"]) == pytest.approx(results["nats"])


@given(TEXTS, st.integers(3, 16), st.data())
@settings(max_examples=60, deadline=None)
def test_sliding_predicts_every_token_but_the_first_once(text: str, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    model = TableModel(16)
    units = protocols.sliding(model, text, window, stride)
    ids = model.encode([text])[0]
    predicted = [token for unit in units for token in unit.requests[0].continuation]
    assert predicted == ids[1:]
    for unit in units[1:]:
        assert len(unit.requests[0].context) >= window - stride
    results, _ = protocols.score(model, units)
    assert results["nats"] == pytest.approx(nats(model, ids, 1, len(ids)), rel=1e-6)
    assert results["bytes"] == len(text.encode())
    assert results["words"] == len(text.split())


@given(TEXTS, st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_document_predicts_every_token_from_bos_on(text: str, window: int) -> None:
    model = TableModel(16, adds_bos=False)
    documents = [Document(text, text), Document("b" + text, text)]
    units = protocols.document(model, documents, window)
    expected = sum(
        nats(model, [BOS, *model.encode([each.content])[0]], 1, len(each.content) + 1) for each in documents
    )
    results, items = protocols.score(model, units)
    assert results["nats"] == pytest.approx(expected, rel=1e-6)
    assert results["words"] == 2 * len(re.split(r"\s+", text))
    assert len(items["nats"]) == 2


@given(st.integers(1, 60), st.integers(2, 16))
def test_documents_are_cut_as_lm_eval_cuts_them(length: int, window: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(1, length + 1))
    theirs = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(tokens, BOS, window, context_len=1)
    ]
    ours = protocols._rolling(BOS, tokens, window)
    assert [(list(request.context), list(request.continuation)) for request in ours] == theirs


def test_numbers_do_not_depend_on_the_order_of_answers() -> None:
    model = TableModel()
    seen: list[tuple[int, int]] = []
    units = protocols.sliding(model, "some text, more of it " * 5, 16, 4)
    results, _ = protocols.score(model, units, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (results["tokens"], results["tokens"])
    assert np.all(np.diff([done for done, _ in seen]) > 0)


def test_a_word_counts_where_it_begins() -> None:
    model = TableModel(16, adds_bos=False)
    first, second = protocols.reference(model, "one two three four", 9)
    assert (first.words, first.bytes) == (2, 8)  # "ne two th": "one" began before what is predicted
    assert (second.words, second.bytes) == (1, 8)


def test_what_cannot_be_measured_is_refused() -> None:
    model = TableModel()
    with pytest.raises(ValueError, match="5 tokens .* window of 16"):
        protocols.reference(model, "four", 16)
    with pytest.raises(ValueError, match="stride = 16 must lie in 1 … 15"):
        protocols.sliding(model, "text", 16, 16)
    with pytest.raises(ValueError, match="no document"):
        protocols.document(TableModel(adds_bos=False), [Document("", "")], 16)
