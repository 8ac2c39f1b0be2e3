"""The steps of training on a CPU in bfloat16, forward and backward: attention, feed-forward, norm, embedding.

ctx.saved_tensors is what a token costs in memory. Where products round their input (quantisation-aware
training), gradients go straight through, and those of weights come from the rounded input. N = B * T tokens;
other letters as in transformer.py, and G = H / K query heads to a key/value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.products import Products
from mobilellm.model.projection import Projection
from mobilellm.model.rounding import Rounding

BLOCK = 128
"""Queries that attend at a time: fewer skip more of what causality hides, more make larger products."""


class Setting(NamedTuple):
    """What all steps of one batch share."""

    kernels: Kernels
    products: Products
    B: int
    T: int
    K: int
    G: int
    D: int
    epsilon: float
    visible: Tensor | None  # (B, T) the first position that each may look at
    cos: Tensor  # (B or nothing, T, D / 2)
    sin: Tensor
    angle_rows: int  # B or 1
    gradient_dtype: torch.dtype  # of the weights

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return self.B, self.T, self.K, self.G, self.D, BLOCK


class EmbeddingAndHead(torch.autograd.Function):
    """One weight's two uses as one step, so that backward adds the rows of the one to the whole of the other.

    Apart, the embedding's gradient would be a second (V, E), zero but for those rows. The head comes in the
    dtype that its gradient is to have.
    """

    @staticmethod
    def forward(ctx: Any, run: Setting, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens)
        ctx.run, ctx.shape = run, weight.shape
        return F.embedding(tokens, weight), weight.detach().to(run.gradient_dtype)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dhead: Tensor | None) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        run: Setting = ctx.run
        dweight = torch.zeros(ctx.shape, dtype=run.gradient_dtype) if dhead is None else dhead
        if dx is not None:
            order = tokens.flatten().argsort(stable=True)
            run.kernels(
                "embedding_backward", dx.contiguous(), tokens.contiguous(), order, dweight,
                int(dweight.dtype == torch.float32), tokens.numel(), dx.shape[-1],
            )  # fmt: skip
        return None, dweight, None


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Setting, rounding: Rounding | None, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        y, *kept = _norm(run, x, weight)
        ctx.save_for_backward(weight, *kept)
        ctx.run = run
        return _rounded(run, rounding, y).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, normed, scale = ctx.saved_tensors
        dy = dy.to(torch.bfloat16).contiguous()
        zeros = torch.zeros(dy.shape)
        return (None, None, *_norm_backward(ctx.run, dy, weight, normed, scale, zeros))


class Attention(torch.autograd.Function):
    """x + o(attend(rotate(q, k, v of norm(x)))); `tensors` are those of qkv, then those of o."""

    @staticmethod
    def forward(
        ctx: Any, run: Setting, qkv: Projection, o: Projection, x: Tensor, norm: Tensor, *tensors: Tensor
    ) -> Tensor:
        x = x.contiguous()
        y, normed, scale = _norm(run, x, norm)
        joint, kept = qkv.through(_rounded(run, qkv.rounding, y), tensors[: qkv.count])  # (N, (H + 2K) * D)
        queries, keys, values = _rotate(run, joint)
        out, total = _attend(run, queries, keys, values)  # (N, H * D)
        out = _rounded(run, o.rounding, out)
        projected, kept_of_o = o.through(out, tensors[qkv.count :])
        ctx.save_for_backward(
            *tensors, *kept, *kept_of_o, normed, norm, scale, queries, keys, values, out, total
        )
        ctx.run, ctx.qkv, ctx.o = run, qkv, o
        return _add(run, x, projected)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        run: Setting = ctx.run
        qkv: Projection = ctx.qkv
        o: Projection = ctx.o
        of_qkv, of_o, kept, kept_of_o, rest = _split(
            ctx.saved_tensors, qkv.count, o.count, qkv.num_kept, o.num_kept
        )
        normed, norm, scale, queries, keys, values, out, total = rest
        wanted, wanted_of_o, _ = _split(ctx.needs_input_grad[5:], qkv.count, o.count)
        dx = dx.contiguous()
        dout, flow = o.back(dx.to(torch.bfloat16).view(-1, dx.shape[-1]), of_o, kept_of_o)
        do = o.gradients(flow, out, of_o, kept_of_o, wanted_of_o, run.gradient_dtype)
        djoint = _attend_backward(run, queries, keys, values, total, dout)
        dy, flow = qkv.back(djoint, of_qkv, kept)
        y = _rounded(run, qkv.rounding, _norm_again(run, normed, norm))
        dqkv = qkv.gradients(flow, y, of_qkv, kept, wanted, run.gradient_dtype)
        return (None, None, None, *_norm_backward(run, dy, norm, normed, scale, dx), *dqkv, *do)


class FeedForward(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))); `tensors` are those of gate_up, then those of down."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Setting,
        gate_up: Projection,
        down: Projection,
        x: Tensor,
        norm: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        x = x.contiguous()
        y, normed, scale = _norm(run, x, norm)
        both, kept = gate_up.through(_rounded(run, gate_up.rounding, y), tensors[: gate_up.count])  # (N, 2F)
        inner = both.new_empty(both.shape[0], both.shape[1] // 2)
        run.kernels("swiglu", both, inner, *inner.shape)
        projected, kept_of_down = down.through(_rounded(run, down.rounding, inner), tensors[gate_up.count :])
        ctx.save_for_backward(*tensors, *kept, *kept_of_down, normed, norm, scale, both)
        ctx.run, ctx.gate_up, ctx.down = run, gate_up, down
        return _add(run, x, projected)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        run: Setting = ctx.run
        gate_up: Projection = ctx.gate_up
        down: Projection = ctx.down
        of_gate_up, of_down, kept, kept_of_down, rest = _split(
            ctx.saved_tensors, gate_up.count, down.count, gate_up.num_kept, down.num_kept
        )
        normed, norm, scale, both = rest
        wanted, wanted_of_down, _ = _split(ctx.needs_input_grad[5:], gate_up.count, down.count)
        dx = dx.contiguous()
        dinner, flow = down.back(dx.to(torch.bfloat16).view(-1, dx.shape[-1]), of_down, kept_of_down)
        dboth, inner = torch.empty_like(both), torch.empty_like(dinner)  # dinner is (N, F)
        run.kernels("swiglu_backward", both, dinner, dboth, inner, *inner.shape)
        inner = _rounded(run, down.rounding, inner)
        ddown = down.gradients(flow, inner, of_down, kept_of_down, wanted_of_down, run.gradient_dtype)
        dy, flow = gate_up.back(dboth, of_gate_up, kept)
        y = _rounded(run, gate_up.rounding, _norm_again(run, normed, norm))
        dgate_up = gate_up.gradients(flow, y, of_gate_up, kept, wanted, run.gradient_dtype)
        return (None, None, None, *_norm_backward(run, dy, norm, normed, scale, dx), *dgate_up, *ddown)


def _split(values: Sequence[Any], *sizes: int) -> Iterator[Sequence[Any]]:
    """Parts of so many values each, and what is left."""
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size
    yield values[start:]


def _norm(run: Setting, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x (B, T, E) as (N, E) in bfloat16; before the weight; what every row was multiplied by."""
    N, E = x.numel() // x.shape[-1], x.shape[-1]
    y, normed = (x.new_empty(N, E, dtype=torch.bfloat16) for _ in range(2))
    scale = x.new_empty(N)
    run.kernels("rms_norm", x, weight, y, normed, scale, N, E, run.epsilon)
    return y, normed, scale


def _norm_again(run: Setting, normed: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty_like(normed)
    run.kernels("rms_norm_again", normed, weight, y, *y.shape)
    return y


def _norm_backward(
    run: Setting, dy: Tensor, weight: Tensor, normed: Tensor, scale: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """residual + the gradient by x, and the gradient by the weight."""
    dx, dweight = torch.empty_like(residual), torch.empty_like(weight)
    run.kernels(
        "rms_norm_backward", dy, normed, weight, scale, residual, dx, dweight, len(scale), normed.shape[1]
    )
    return dx, dweight


def _rounded(run: Setting, rounding: Rounding | None, x: Tensor) -> Tensor:
    """x (N, C) as a quantised product takes it, in place."""
    if rounding is not None:
        group = rounding.group or x.shape[1]
        run.kernels("round_activations", x, x.numel(), group, int(rounding.symmetric))
    return x


def _add(run: Setting, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    run.kernels("add", x, y, out, x.numel())
    return out


def _rotate(run: Setting, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in blocks, keys and values (B * K, T, D)."""
    B, T, K, G, D, _ = run.shape
    queries = joint.new_empty(B * T * K * G, D)
    keys, values = joint.new_empty(B * K, T, D), joint.new_empty(B * K, T, D)
    run.kernels("rotary", joint, queries, keys, values, run.cos, run.sin, run.angle_rows, *run.shape, 0)
    return queries, keys, values


def _blocks(run: Setting) -> list[tuple[int, int, slice]]:
    """First position, number of positions and rows of every block of queries."""
    heads, parts = run.B * run.K * run.G, []
    for start in range(0, run.T, BLOCK):
        length = min(BLOCK, run.T - start)
        parts.append((start, length, slice(heads * start, heads * (start + length))))
    return parts


def _attend(run: Setting, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (N, H * D) and the logarithm of every query's sum of exponentials."""
    B, T, K, G, D, _ = run.shape
    multiply = run.products.multiply
    blocks, total = torch.empty_like(queries), torch.empty(len(queries))
    for start, length, rows in _blocks(run):
        end = start + length
        scores = multiply(queries[rows].view(B * K, G * length, D), keys[:, :end].mT)
        run.kernels(
            "softmax", scores, total[rows], run.visible, D**-0.5, B, T, K * G, start, length, end
        )  # fmt: skip
        multiply(scores, values[:, :end], blocks[rows].view(B * K, G * length, D))
    out = queries.new_empty(B * T, K * G * D)
    run.kernels("move_heads", blocks, out, *run.shape, 0)
    return out, total


def _attend_backward(
    run: Setting, queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, dout: Tensor
) -> Tensor:
    """Gradient by the joint rows of unrotated queries, keys and values; probabilities are made again."""
    B, T, K, G, D, _ = run.shape
    multiply = run.products.multiply
    dblocks, dqueries = torch.empty_like(queries), torch.empty_like(queries)
    run.kernels("move_heads", dblocks, dout, *run.shape, 1)
    dkeys = dvalues = keys.new_empty(0)
    for start, length, rows in reversed(_blocks(run)):  # the last block sees all keys
        end, shape = start + length, (B * K, G * length, D)
        q, d, k, v = queries[rows].view(shape), dblocks[rows].view(shape), keys[:, :end], values[:, :end]
        scores, dscores = multiply(q, k.mT), multiply(d, v.mT)
        run.kernels(
            "softmax_backward", scores, dscores, total[rows], run.visible, D**-0.5,
            B, T, K * G, start, length, end,
        )  # fmt: skip
        multiply(dscores, k, dqueries[rows].view(shape))
        dk, dv = multiply(dscores.mT, q), multiply(scores.mT, d)
        if end == T:
            several = start > 0
            dkeys, dvalues = (dk.float(), dv.float()) if several else (dk, dv)
        else:
            dkeys[:, :end] += dk
            dvalues[:, :end] += dv
    djoint = dout.new_empty(B * T, (K * G + 2 * K) * D)
    dkeys, dvalues = dkeys.to(torch.bfloat16), dvalues.to(torch.bfloat16)
    run.kernels("rotary", djoint, dqueries, dkeys, dvalues, run.cos, run.sin, run.angle_rows, *run.shape, 1)
    return djoint
