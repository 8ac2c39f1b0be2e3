"""A teacher's top k against its own whole logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import LS
from tiny_teachers import TinyTeacher, passages
from torch import Tensor

from mobilellm.train import teacher as teacher_module
from mobilellm.train.teacher import top_k
from mobilellm.train.teacher_cache import Passage


@pytest.mark.parametrize(("vocab_size", "k", "temperature"), [(384, 8, 2.0), (300, 1, 1.0), (384, 384, 1.0)])
def test_it_is_that_of_its_whole_logits(
    vocab_size: int, k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the embedding has beyond the tokenizer's vocabulary is left out."""
    monkeypatch.setattr(teacher_module, "CHUNK_LOGITS", 5 * vocab_size)
    monkeypatch.setitem(teacher_module.TOKENS_AT_ONCE, "cpu", 100)
    teacher, given = TinyTeacher(vocab_size), passages(12)
    for passage, (ids, logs) in zip(given, top_k(teacher, given, k, temperature), strict=True):
        with torch.no_grad():
            logits = teacher.model(torch.from_numpy(passage.tokens)[None])[0]
        wanted = (logits[passage.counted, :vocab_size] / temperature).log_softmax(-1)
        best = wanted.topk(k)
        assert ids.dtype == np.uint16
        assert np.allclose(logs[:, :-1], best.values, atol=1e-2)  # stored in half precision
        assert np.allclose(wanted.gather(-1, torch.from_numpy(ids.astype(np.int64))), best.values, atol=1e-5)
        shares = np.exp(logs.astype(np.float64)).sum(-1)
        assert np.allclose(shares, 1, atol=1e-2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k = 385 is more than the teacher's vocabulary of 384"):
        top_k(TinyTeacher(), passages(1), 385, 1.0)
    longer = np.ones(LS.max_position_embeddings + 1, np.int64)
    with pytest.raises(ValueError, match=f"context of {LS.max_position_embeddings} tokens is shorter"):
        top_k(TinyTeacher(), [Passage(longer, longer > 0)], 4, 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    class Broken(TinyTeacher):
        def logits(self, states: Tensor) -> Tensor:
            logits = super().logits(states)
            logits[-1, 5] = bad
            return logits

    with pytest.raises(ValueError, match=r"tiny: gives logits that are no numbers .* in float32; try"):
        top_k(Broken(), passages(3), 4, 1.0)
