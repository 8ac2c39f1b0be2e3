"""Scales that lose least: tried out for every group, each weight's error counted as much as it matters."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.quant.formats import WeightFormat

_SHARES = tuple(thousandth / 1000 for thousandth in range(550, 1101, 25))
"""Scales to try, as parts of the one that reaches the group's largest weight. Outliers may be cut off."""
_ELEMENTS_AT_ONCE = 2**22


def best_scales(weight: Tensor, importance: Tensor, kind: WeightFormat) -> Tensor:
    """Stored scales (R, groups) of float32 weights (R, C) with the least sum of importance * error².

    `importance` (C,) is that of a column. The best of a list is moved to where least squares would have it
    for its codes, if that is better still. Round-to-nearest's scale is in the list, so that none is worse.
    """
    runs = kind.grouped(weight)
    matters = importance.view(1, runs.shape[1], -1)
    rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    return torch.cat([_best(part, matters, kind) for part in torch.split(runs, rows)])


def _best(runs: Tensor, matters: Tensor, kind: WeightFormat) -> Tensor:
    """(R, groups, group) -> (R, groups)"""
    most = _reaching(runs, kind)
    best = kind.stored_scales(most)
    least = _loss(runs, matters, best, kind)
    signs = (1.0, -1.0) if kind.signed_scales else (1.0,)
    for share in _SHARES:
        for sign in signs:
            best, least = _better(runs, matters, kind.stored_scales(sign * share * most), best, least, kind)
    codes = kind.nearest(runs, best).float()
    squares = (matters * codes.square()).sum(-1)
    fitted = torch.where(squares > 0, (matters * codes * runs).sum(-1) / squares, best.float())
    return _better(runs, matters, kind.stored_scales(fitted), best, least, kind)[0]


def _reaching(runs: Tensor, kind: WeightFormat) -> Tensor:
    """Round-to-nearest's scales: the largest weight becomes the largest code, in q4_0 -8."""
    largest = runs.abs().amax(-1)
    if kind.signed_scales:
        place = runs.abs().argmax(-1, keepdim=True)
        largest = -runs.gather(-1, place)[..., 0]
    return largest / kind.steps


def _better(
    runs: Tensor, matters: Tensor, scales: Tensor, best: Tensor, least: Tensor, kind: WeightFormat
) -> tuple[Tensor, Tensor]:
    loss = _loss(runs, matters, scales, kind)
    better = loss < least
    return torch.where(better, scales, best), torch.where(better, loss, least)


def _loss(runs: Tensor, matters: Tensor, scales: Tensor, kind: WeightFormat) -> Tensor:
    values = kind.nearest(runs, scales).float() * scales.float()[..., None]
    return (matters * (values - runs).square()).sum(-1)
