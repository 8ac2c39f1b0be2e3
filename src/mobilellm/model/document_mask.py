"""Packed rows of documents that stand alone: positions, masks, and the attention that takes them.

On a GPU FlexAttention (torch.nn.attention.flex_attention; Dong et al. 2024, arXiv 2412.05496) skips the
blocks of the mask that are empty and never makes it whole; everywhere else, and where FlexAttention does not
prove itself on the device, the mask is a dense boolean (B, 1, T, T) for scaled_dot_product_attention.
B rows, T tokens, H heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_log = logging.getLogger("mobilellm")


def document_starts(segments: Tensor) -> Tensor:
    """Where the document of every token begins in its row: (B, T) positions."""
    columns = torch.arange(segments.shape[1], device=segments.device)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(new, columns, 0).cummax(dim=1).values


def segmented_view(segments: Tensor) -> tuple[Tensor, Tensor | BlockMask]:
    """Positions (B, T) and mask of rows whose documents `segments` (B, T) numbers."""
    starts, columns = document_starts(segments), torch.arange(segments.shape[1], device=segments.device)
    if flex_works(segments.device):
        return columns - starts, block_mask(starts)
    mask = (columns >= starts[..., None]) & (columns <= columns[:, None])
    return columns - starts, mask[:, None]


def block_mask(starts: Tensor) -> BlockMask:
    """FlexAttention's mask: no token looks before the start (B, T) of its document, or after itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query])

    B, T = starts.shape
    return create_block_mask(visible, B, None, T, T, device=str(starts.device))


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, T, D); queries and keys take the dtype of the values."""
    function = _flex(q.device.type == "cuda" and not torch.compiler.is_compiling())
    out: Tensor = function(
        q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


@functools.cache
def flex_works(device: torch.device) -> bool:
    """Whether FlexAttention gives on this GPU what the dense mask gives, gradients too: tried out once."""
    if device.type != "cuda":
        return False
    try:
        with torch.enable_grad():
            return _agrees(device)
    except Exception as error:  # no triton, an old GPU, a compiler that fails
        reason = " ".join(str(error).split())[:200]
        _log.warning("document masks are dense: FlexAttention does not run on %s (%s)", device, reason)
        return False


def _agrees(device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64))
    parts = [
        torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
        for shape in shapes
    ]
    columns = torch.arange(256, device=device)
    starts = torch.stack((columns // 100 * 100, columns // 37 * 37))
    dense = (columns >= starts[..., None]) & (columns <= columns[:, None])
    ours = attend_in_blocks(parts[0], parts[1], parts[2], block_mask(starts))
    q, k, v = parts
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None], enable_gqa=True)
    pairs = [(ours, theirs)]
    pairs += zip(*(torch.autograd.grad(out.sum(), parts) for out in (ours, theirs)), strict=True)
    good = all(torch.allclose(a.float(), b.float(), atol=0.05, rtol=0.05) for a, b in pairs)
    if not good:
        _log.warning("document masks are dense: FlexAttention computes something else on %s", device)
    return good


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    return torch.compile(function) if compiled else function
