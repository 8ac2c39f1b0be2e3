"""A plain loop over documents in place of `varlen_attn`'s kernels, which run on GPUs only."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


@contextlib.contextmanager
def kernels_on_the_cpu() -> Iterator[None]:
    """Under torch's own operators, whose Python and derivatives stay."""
    assert varlen.varlen_attn  # its operators are there
    library = torch.library.Library("torch_attn", "IMPL")
    library.impl("_varlen_attn", forward, "CPU")
    library.impl("_varlen_attn_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def each_alone(q: Tensor, k: Tensor, bounds: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Documents (tokens, heads, width) one after the other, and whom each token looks at: (heads, n, n)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    for first, end in itertools.pairwise(bounds.tolist()):
        part = slice(first, end)
        scores = torch.einsum("qhd,khd->hqk", q[part], k[part]).double() / q.shape[2] ** 0.5
        yield part, scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1).to(q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, others: Tensor, longest: int, *rest: Any
) -> tuple[Tensor, ...]:
    assert rest[:3] == (longest, True, None)  # causal, scaled as usual
    assert q.is_contiguous()
    assert (bounds.dtype, int(bounds[0]), int(bounds[-1])) == (torch.int32, 0, len(q))
    assert torch.equal(bounds, others)
    assert int(bounds.diff().max()) <= longest
    out, values = torch.empty_like(q), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    for part, weights in each_alone(q, k, bounds):
        out[part] = torch.einsum("hqk,khd->qhd", weights, values[part])
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def backward(
    direction: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, bounds: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """By hand: below autograd's place among the kernels there is none."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (part.repeat_interleave(groups, 1) for part in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
    for part, weights in each_alone(q, k, bounds):
        dv[part] = torch.einsum("hqk,qhd->khd", weights, direction[part])
        by_weights = torch.einsum("qhd,khd->hqk", direction[part], values[part])
        by_scores = weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
        dq[part] = torch.einsum("hqk,khd->qhd", by_scores, keys[part])
        dk[part] = torch.einsum("hqk,qhd->khd", by_scores, q[part])
    shape = (len(k), k.shape[1], groups, k.shape[2])
    return dq, dk.view(shape).sum(2), dv.view(shape).sum(2)
