"""The same weights laid out for inference: q, k, v in one matrix, gate and up in one, CPU kernels chosen.

Measured on two cores of an AVX-512 server chip, one token through a 125M model (docs/log.md): torch's own
float32 matrix-vector product runs on one thread (11 GB/s), oneDNN's on both (21 GB/s); bfloat16 weights in
oneDNN's blocked layout read at 19–24 GB/s against 11–14 in the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model.products import has_bfloat16
from mobilellm.model.rounding import Rounding
from mobilellm.model.transformer import Attention, Linear, MobileLLM, SwiGLU

Product = Callable[[Tensor], Tensor]


class FusedBlock(NamedTuple):
    qkv: Product  # (…, E) -> (…, (H + 2K) * D)
    o: Product
    gate_up: Product  # (…, E) -> (…, 2F)
    down: Product


class FusedWeights(NamedTuple):
    """One entry per stored block, and the head."""

    blocks: tuple[FusedBlock, ...]
    head: Product
    sources: tuple[Tensor, ...]
    """The weights these are a copy of. Holding them keeps their addresses from being given to others."""
    key: tuple[object, ...]
    """What the sources were like when they were copied: `_key`."""


@torch.inference_mode()
def fuse(model: MobileLLM, reuse: FusedWeights | None = None) -> FusedWeights:
    """Build the inference layout of a model's weights, or return `reuse` if they have not changed since."""
    sources = tuple(parameter.detach() for parameter in model.parameters() if parameter.ndim == 2)
    key = (*_key(sources), *_roundings(model))
    if reuse is not None and reuse.key == key:
        return reuse
    blocks = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, Attention)
        assert isinstance(mlp, SwiGLU)
        blocks.append(
            FusedBlock(
                qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
                o=_joined(attention.o_proj),
                gate_up=_joined(mlp.gate_proj, mlp.up_proj),
                down=_joined(mlp.down_proj),
            )
        )
    return FusedWeights(tuple(blocks), _product(model.head_rounding, model.head_weight), sources, key)


def _roundings(model: MobileLLM) -> tuple[Rounding | None, ...]:
    linears = (part for part in model.modules() if isinstance(part, Linear))
    return (model.head_rounding, *(part.rounding for part in linears))


def _key(weights: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    """Address, autograd's version, and the sum of the bits of every weight.

    The version alone misses what goes round autograd: `weight.data` and `torch.optim.AdamW(fused=True)`. The
    sum reads every weight once, which takes about as long as one token.
    """
    sums: list[int] = torch.stack([_words(weight).sum() for weight in weights]).tolist() if weights else []
    return tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version, total)
        for weight, total in zip(weights, sums, strict=True)
    )


def _words(weight: Tensor) -> Tensor:
    """The bits of a weight as whole numbers, the widest its place in memory allows: those add up fastest."""
    flat = weight.reshape(-1)
    for dtype in (torch.int64, torch.int32, torch.int16):
        count = dtype.itemsize // weight.element_size()
        if count and flat.numel() % count == 0 and flat.storage_offset() % count == 0:
            return flat.view(dtype)
    return flat.view(torch.int8)


def _joined(*parts: Linear) -> Product:
    rounding = parts[0].rounding
    assert all(part.rounding == rounding for part in parts), "what has one input rounds it in one way"
    return _product(rounding, *(part.weight for part in parts))


def _product(rounding: Rounding | None, *weights: Tensor) -> Product:
    """A function x -> concatenated x @ weight.T of the rounded x."""
    product = _linear(*weights)
    return product if rounding is None else lambda x: product(rounding(x))


def _linear(*weights: Tensor) -> Product:
    """The same of x as it is, with the fastest kernel for the device and dtype."""
    weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return lambda x: F.linear(x, weight)
    onednn = torch.ops.mkldnn._linear_pointwise
    if weight.dtype == torch.float32:
        return lambda x: onednn(x, weight, None, "none", [], "")
    if weight.dtype == torch.bfloat16 and has_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        return lambda x: onednn(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)
