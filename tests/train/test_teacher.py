"""A teacher's top k against its own whole logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import LS
from tiny_teachers import TinyTeacher, rows
from torch import Tensor

from mobilellm.train import teacher as teacher_module
from mobilellm.train.teacher import top_k


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("vocab_size", "k", "temperature"), [(384, 8, 2.0), (300, 1, 1.0), (384, 384, 1.0)])
def test_it_is_that_of_its_whole_logits(
    documents: bool, vocab_size: int, k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents stand alone; what the embedding has beyond the tokenizer's vocabulary is left out."""
    monkeypatch.setattr(teacher_module, "CHUNK_LOGITS", 5 * vocab_size)
    teacher, given = TinyTeacher(vocab_size), rows(12, 30, documents=documents)
    for row, (ids, logs) in zip(given, top_k(teacher, given, k, temperature), strict=True):
        segments = None if row.segments is None else torch.from_numpy(row.segments)[None]
        with torch.no_grad():
            logits = teacher.model.logits(
                teacher.model.hidden(torch.from_numpy(row.tokens)[None], segments=segments)
            )
        wanted = (logits[0, row.counted, :vocab_size] / temperature).log_softmax(-1)
        best = wanted.topk(k)
        assert ids.dtype == np.uint16
        assert np.allclose(logs[:, :-1], best.values, atol=1e-2)  # stored in half precision
        assert np.allclose(wanted.gather(-1, torch.from_numpy(ids.astype(np.int64))), best.values, atol=1e-5)
        shares = np.exp(logs.astype(np.float64)).sum(-1)
        assert np.allclose(shares, 1, atol=1e-2)


def test_only_what_counts_is_computed() -> None:
    teacher, (row, *_) = TinyTeacher(), rows(1, 30)
    row.counted[10:] = False
    row.counted[9] = True
    top_k(teacher, [row], 4, 1.0)
    assert teacher.tokens == 10


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k = 385 is more than the teacher's vocabulary of 384"):
        top_k(TinyTeacher(), rows(1, 8), 385, 1.0)
    with pytest.raises(ValueError, match=f"context of {LS.max_position_embeddings} tokens is shorter"):
        top_k(TinyTeacher(), rows(1, LS.max_position_embeddings + 40), 4, 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    class Broken(TinyTeacher):
        def logits(self, states: Tensor) -> Tensor:
            logits = super().logits(states)
            logits[-1, 5] = bad
            return logits

    with pytest.raises(ValueError, match=r"tiny: gives logits that are no numbers .* in float32; try"):
        top_k(Broken(), rows(3, 8), 4, 1.0)
