"""The forward pass to train with; on a CPU in bfloat16 a faster way through the blocks.

The faster way computes what the modules of transformer.py compute, with the same weights. Matrix products go
to torch; all that lies between them is done by cpu_kernels.c in one pass over memory each, and little is kept
for backward. The residual stream, the norms' sums and all gradients of weights are float32.
N = B * T tokens; other letters as in transformer.py, and G = H / K query heads to a key/value head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model import cpu_kernels
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.document_mask import document_starts
from mobilellm.model.rope import angles
from mobilellm.model.transformer import Block, Linear, MobileLLM

BLOCK = 128
"""Queries that attend at a time: fewer skip more of what causality hides, more make larger products."""


def training_hidden(
    model: MobileLLM,
    tokens: Tensor,
    segments: Tensor | None = None,
    activation_checkpointing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Final hidden states (B, T, E) as `MobileLLM.hidden`, and the head's weight (V, E), for a loss.

    `segments` (B, T) numbers the documents of every row in order: no token attends outside its own, and
    positions begin at 0 in each. With `activation_checkpointing` blocks keep their inputs only and run again
    in backward. Where the faster way is taken the hidden states are bfloat16, and the gradient of the head's
    weight is changed in place: it must come from nothing but one function that made it.
    """
    kernels = None if why_plain(model) else cpu_kernels.load()
    if not isinstance(kernels, Kernels):
        hidden = model.hidden(tokens, segments=segments, activation_checkpointing=activation_checkpointing)
        return hidden, model.head_weight
    runner = Runner(kernels, model, tokens, segments)
    hidden = model.hidden(tokens, activation_checkpointing=activation_checkpointing, runner=runner)
    return hidden, model.head_weight if runner.head is None else runner.head


def why_plain(model: MobileLLM) -> str | None:
    """Why training would run the plain modules here and now; None where the faster way is open."""
    if model.head_weight.device.type != "cpu":
        return f"the device is {model.head_weight.device.type}"
    if not torch.is_grad_enabled():
        return "no gradients are wanted"
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "products are not in bfloat16"
    if torch.compiler.is_compiling() or any(block._compiled_call_impl for block in model.model.layers):
        return "the blocks are compiled"
    found = cpu_kernels.load()
    return found if isinstance(found, str) else None


class Runner:
    """Runs blocks and the final norm for one batch."""

    def __init__(self, kernels: Kernels, model: MobileLLM, tokens: Tensor, segments: Tensor | None) -> None:
        config = model.config
        self.kernels, self.epsilon = kernels, config.rms_norm_eps
        self.B, self.T = tokens.shape
        self.K, self.D = config.num_kv_heads, config.head_dim
        self.G = config.num_heads // config.num_kv_heads
        self.visible: Tensor | None = None  # (B, T) the first position that each may look at
        positions = torch.arange(self.T)
        if segments is not None:
            starts = document_starts(segments)
            positions = positions - starts
            self.visible = starts.to(torch.int32).contiguous()
        angle = angles(positions, config.head_dim, config.rope_theta)
        self.cos, self.sin = angle.cos().contiguous(), angle.sin().contiguous()  # (B or nothing, T, D / 2)
        self.angle_rows = 1 if segments is None else self.B
        self.tied = config.tie_word_embeddings
        self.head: Tensor | None = None
        """The weight to use for the head where it is the embedding's, after `embed`."""

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return self.B, self.T, self.K, self.G, self.D, BLOCK

    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, E) of tokens."""
        if not (self.tied and _plain(weight)):
            return F.embedding(tokens, weight)
        function: Any = _EmbeddingAndHead.apply
        x: Tensor
        x, self.head = function(self, weight, tokens)
        return x

    def block(self, block: Block, x: Tensor) -> Tensor | None:
        """What `block` makes of x (B, T, E); None where its parts are not those this way knows."""
        attention, mlp = block.self_attn, block.mlp
        linears = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        norms = (block.input_layernorm, block.post_attention_layernorm)
        known = all(_known(part, Linear) for part in linears) and all(
            _known(part, nn.RMSNorm) for part in norms
        )
        if not known or x.dtype != torch.float32:
            return None
        weights: list[Any] = [part.weight for part in linears]
        function: Any = _Attention.apply
        x = function(self, x, norms[0].weight, *weights[:4])
        function = _FeedForward.apply
        out: Tensor = function(self, x, norms[1].weight, *weights[4:])
        return out

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """The final norm (B, T, E), in bfloat16 as the head's product takes it."""
        if not _known(norm, nn.RMSNorm) or x.dtype != torch.float32:
            plain: Tensor = norm(x)
            return plain
        function: Any = _Norm.apply
        out: Tensor = function(self, x, norm.weight)
        return out


def _known(part: Any, kind: type[nn.Module]) -> bool:
    """Neither wrapped nor replaced (adapters, quantisation), no hooks, its weight a plain one in training."""
    if type(part) is not kind:
        return False
    hooked = (
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    )
    weight: Any = part.weight
    return _plain(weight) and not hooked


def _plain(weight: Tensor) -> bool:
    known = type(weight) in (nn.Parameter, Tensor) and weight.dtype == torch.float32
    return known and weight.is_contiguous() and weight.requires_grad


# The steps, forward and backward. ctx.saved_tensors is what a token costs in memory.


class _EmbeddingAndHead(torch.autograd.Function):
    """One weight's two uses as one step, so that backward adds the rows of the one to the whole of the other.

    Apart, the embedding's gradient would be a second (V, E), zero but for those rows.
    """

    @staticmethod
    def forward(ctx: Any, run: Runner, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens)
        ctx.run, ctx.shape = run, weight.shape
        return F.embedding(tokens, weight), weight.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dhead: Tensor | None) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        dweight = torch.zeros(ctx.shape) if dhead is None else dhead
        if dx is not None:
            dx, run = dx.contiguous(), ctx.run
            run.kernels("embedding_backward", dx, tokens.contiguous(), dweight, tokens.numel(), dx.shape[-1])
        return None, dweight, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Runner, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        y, scale = _norm(run, x, weight)
        ctx.save_for_backward(x, weight, scale)
        ctx.run = run
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dy = dy.to(torch.bfloat16).contiguous()
        return (None, *_norm_backward(ctx.run, dy, x, weight, scale, torch.zeros_like(x)))


class _Attention(torch.autograd.Function):
    """x + o(attend(rotate(q, k, v of norm(x))))"""

    @staticmethod
    def forward(
        ctx: Any, run: Runner, x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor
    ) -> Tensor:
        x = x.contiguous()
        y, scale = _norm(run, x, norm)
        joint = y @ _narrow(q, k, v).t()  # (N, (H + 2K) * D)
        queries, keys, values = _rotate(run, joint)
        out, total = _attend(run, queries, keys, values)  # (N, H * D)
        ctx.save_for_backward(x, norm, q, k, v, o, scale, queries, keys, values, out, total)
        ctx.run = run
        return _add(run, x, out @ _narrow(o).t())

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        run: Runner = ctx.run
        x, norm, q, k, v, o, scale, queries, keys, values, out, total = ctx.saved_tensors
        dx = dx.contiguous()
        dy = _narrow(dx).view(-1, dx.shape[-1])
        do = (dy.t() @ out).float()
        dout = dy @ _narrow(o)
        djoint = _attend_backward(run, queries, keys, values, total, dout)
        dnormed = djoint @ _narrow(q, k, v)
        dqkv = djoint.t() @ _norm_again(run, x, norm, scale)
        dq, dk, dv = (part.float() for part in torch.split(dqkv, [len(q), len(k), len(v)]))
        return (None, *_norm_backward(run, dnormed, x, norm, scale, dx), dq, dk, dv, do)


class _FeedForward(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x)))"""

    @staticmethod
    def forward(
        ctx: Any, run: Runner, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        x = x.contiguous()
        y, scale = _norm(run, x, norm)
        gate_up = y @ _narrow(gate, up).t()  # (N, 2F)
        inner = gate_up.new_empty(gate_up.shape[0], gate.shape[0])
        run.kernels("swiglu", gate_up, inner, *inner.shape)
        ctx.save_for_backward(x, norm, gate, up, down, scale, gate_up)
        ctx.run = run
        return _add(run, x, inner @ _narrow(down).t())

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        run: Runner = ctx.run
        x, norm, gate, up, down, scale, gate_up = ctx.saved_tensors
        dx = dx.contiguous()
        dy = _narrow(dx).view(-1, dx.shape[-1])
        dinner = dy @ _narrow(down)  # (N, F)
        dgate_up, inner = torch.empty_like(gate_up), torch.empty_like(dinner)
        run.kernels("swiglu_backward", gate_up, dinner, dgate_up, inner, *inner.shape)
        ddown = (dy.t() @ inner).float()
        dnormed = dgate_up @ _narrow(gate, up)
        dboth = dgate_up.t() @ _norm_again(run, x, norm, scale)
        dgate, dup = (part.float() for part in torch.split(dboth, len(gate)))
        return (None, *_norm_backward(run, dnormed, x, norm, scale, dx), dgate, dup, ddown)


def _narrow(*weights: Tensor) -> Tensor:
    """In bfloat16, one above the other."""
    if len(weights) == 1:
        return weights[0].to(torch.bfloat16)
    rows = sum(len(weight) for weight in weights)
    out = torch.empty(rows, weights[0].shape[1], dtype=torch.bfloat16)
    for part, weight in zip(torch.split(out, [len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    return out


def _norm(run: Runner, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of x (B, T, E) as (N, E) in bfloat16, and what every row was multiplied by."""
    N, E = x.numel() // x.shape[-1], x.shape[-1]
    y, scale = x.new_empty(N, E, dtype=torch.bfloat16), x.new_empty(N)
    run.kernels("rms_norm", x, weight, y, scale, N, E, run.epsilon)
    return y, scale


def _norm_again(run: Runner, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    y = x.new_empty(len(scale), x.shape[-1], dtype=torch.bfloat16)
    run.kernels("rms_norm_again", x, weight, scale, y, *y.shape)
    return y


def _norm_backward(
    run: Runner, dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """residual + the gradient by x, and the gradient by the weight."""
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    run.kernels("rms_norm_backward", dy, x, weight, scale, residual, dx, dweight, len(scale), x.shape[-1])
    return dx, dweight


def _add(run: Runner, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    run.kernels("add", x, y, out, x.numel())
    return out


def _rotate(run: Runner, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in blocks, keys and values (B * K, T, D)."""
    B, T, K, G, D, _ = run.shape
    queries = joint.new_empty(B * T * K * G, D)
    keys, values = joint.new_empty(B * K, T, D), joint.new_empty(B * K, T, D)
    run.kernels("rotary", joint, queries, keys, values, run.cos, run.sin, run.angle_rows, *run.shape, 0)
    return queries, keys, values


def _blocks(run: Runner) -> list[tuple[int, int, slice]]:
    """First position, number of positions and rows of every block of queries."""
    heads, parts = run.B * run.K * run.G, []
    for start in range(0, run.T, BLOCK):
        length = min(BLOCK, run.T - start)
        parts.append((start, length, slice(heads * start, heads * (start + length))))
    return parts


def _attend(run: Runner, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (N, H * D) and the logarithm of every query's sum of exponentials."""
    B, T, K, G, D, _ = run.shape
    blocks, total = torch.empty_like(queries), torch.empty(len(queries))
    for start, length, rows in _blocks(run):
        end = start + length
        scores = torch.bmm(queries[rows].view(B * K, G * length, D), keys[:, :end].mT)
        run.kernels(
            "softmax", scores, total[rows], run.visible, D**-0.5, B, T, K * G, start, length, end
        )  # fmt: skip
        torch.bmm(scores, values[:, :end], out=blocks[rows].view(B * K, G * length, D))
    out = queries.new_empty(B * T, K * G * D)
    run.kernels("move_heads", blocks, out, *run.shape, 0)
    return out, total


def _attend_backward(
    run: Runner, queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, dout: Tensor
) -> Tensor:
    """Gradient by the joint rows of unrotated queries, keys and values; probabilities are made again."""
    B, T, K, G, D, _ = run.shape
    dblocks, dqueries = torch.empty_like(queries), torch.empty_like(queries)
    run.kernels("move_heads", dblocks, dout, *run.shape, 1)
    dkeys = dvalues = keys.new_empty(0)
    for start, length, rows in reversed(_blocks(run)):  # the last block sees all keys
        end, shape = start + length, (B * K, G * length, D)
        q, d, k, v = queries[rows].view(shape), dblocks[rows].view(shape), keys[:, :end], values[:, :end]
        scores, dscores = torch.bmm(q, k.mT), torch.bmm(d, v.mT)
        run.kernels(
            "softmax_backward", scores, dscores, total[rows], run.visible, D**-0.5,
            B, T, K * G, start, length, end,
        )  # fmt: skip
        torch.bmm(dscores, k, out=dqueries[rows].view(shape))
        dk, dv = torch.bmm(dscores.mT, q), torch.bmm(scores.mT, d)
        if end == T:
            several = start > 0
            dkeys, dvalues = (dk.float(), dv.float()) if several else (dk, dv)
        else:
            dkeys[:, :end] += dk
            dvalues[:, :end] += dv
    djoint = dout.new_empty(B * T, (K * G + 2 * K) * D)
    dkeys, dvalues = _narrow(dkeys), _narrow(dvalues)
    run.kernels("rotary", djoint, dqueries, dkeys, dvalues, run.cos, run.sin, run.angle_rows, *run.shape, 1)
    return djoint
