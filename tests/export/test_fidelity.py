"""Divergence and perplexity as torch computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_answers import QUESTIONS, answers

from mobilellm.export.fidelity import fidelity


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 5))
def test_fidelity_is_what_torch_computes(seed: int, scale: float) -> None:
    theirs, ours = answers(seed, scale), answers(seed + 1, scale)
    measured = fidelity(theirs, QUESTIONS, ours.logits, theirs.logits)
    first, second = (
        torch.log_softmax(torch.from_numpy(np.concatenate(each.logits)).double(), -1)
        for each in (ours, theirs)
    )
    kl = torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean").item()
    assert measured.kl == measured.cost == pytest.approx(kl, rel=1e-4, abs=1e-6)
    rows, following = [0, 1, 2, 4, 5], [3, 4, 5, 6, 7]
    nats = torch.nn.functional.nll_loss(second[rows], torch.tensor(following)).item()
    assert measured.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
