"""One forward pass over a few prefix trees, and the answers it gives.

B trees, T nodes of the largest, R states that predict something, E hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm.eval.interface import Likelihood, Request
from mobilellm.eval.prefix_tree import PrefixTree
from mobilellm.model.fused import FusedWeights
from mobilellm.model.scoring import states_at, summary
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import PAD_ID

LOGITS_AT_ONCE = 2**24
"""Elements of the logits held at a time: 64 MiB in float32, whatever batch and vocabulary."""


class Rows(NamedTuple):
    """Trees as the rows of a batch, on the model's device."""

    tokens: Tensor  # (B, T)
    depths: Tensor  # (B, T)
    ends: Tensor | None  # (B, T) where what a node is part of ends; None where all see all before them


@torch.inference_mode()
def answers(
    model: MobileLLM, fused: FusedWeights, trees: Sequence[PrefixTree], requests: Sequence[Request]
) -> list[tuple[int, Likelihood]]:
    """(number, answer) of every request that has its place in one of the trees."""
    rows = _rows(trees, model.head_weight.device)
    width = rows.tokens.shape[1]
    places = [
        (place.request, place.nodes + row * width) for row, tree in enumerate(trees) for place in tree.places
    ]
    wanted = np.concatenate([requests[request].continuation for request, _ in places])
    states, which = np.unique(np.concatenate([nodes for _, nodes in places]), return_inverse=True)
    asked = torch.from_numpy(states).to(rows.tokens.device)
    hidden = states_at(model, fused, rows.tokens, rows.depths, rows.ends, asked)  # (R, E)
    likelihoods, best = _predicted(model, fused, hidden, which, wanted)
    cuts = np.cumsum([len(nodes) for _, nodes in places])[:-1]
    parts = zip(places, np.split(likelihoods, cuts), np.split(best, cuts), strict=True)
    return [(request, Likelihood(values, bool(right.all()))) for (request, _), values, right in parts]


def _rows(trees: Sequence[PrefixTree], device: torch.device) -> Rows:
    """Padding stands behind every tree, where no node looks, and sees itself: nothing to look at is NaN."""
    width = max(map(len, trees))
    shape = (len(trees), width)
    tokens, depths = np.full(shape, PAD_ID, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    ends = np.tile(np.arange(1, width + 1, dtype=np.int32), (len(trees), 1))
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)], depths[row, : len(tree)] = tree.tokens, tree.depths
        ends[row, : len(tree)] = tree.ends
    chains = all(tree.is_chain for tree in trees)
    return Rows(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(depths).to(device),
        None if chains else torch.from_numpy(ends).to(device),
    )


def _predicted(
    model: MobileLLM,
    fused: FusedWeights,
    hidden: Tensor,
    which: NDArray[np.int64],
    wanted: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """For every pair of a row of `hidden` and a token: its log-likelihood, and whether none is likelier."""
    device = hidden.device
    order = np.argsort(which, kind="stable")
    row, token = (torch.from_numpy(part[order]).to(device) for part in (which, wanted))
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    bounds = np.searchsorted(which[order], range(0, len(hidden) + at_once, at_once))
    likelihoods, best = [], []
    for number, states in enumerate(torch.split(hidden, at_once)):
        pairs = slice(int(bounds[number]), int(bounds[number + 1]))
        logits = model.logits(states, fused)
        here = row[pairs] - number * at_once
        total, highest = summary(logits)
        likelihoods.append(logits[here, token[pairs]].float() - total[here])
        best.append(highest[here] == token[pairs])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return torch.cat(likelihoods).cpu().numpy()[back], torch.cat(best).cpu().numpy()[back]
