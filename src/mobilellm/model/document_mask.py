"""Packed rows of documents that stand alone: positions, masks, and the attention that takes them.

Three ways to the same numbers. On a GPU, in 16 bits, FlashAttention over documents one after the other
(torch.nn.attention.varlen; Dao 2023, arXiv 2307.08691): a kernel written by hand, which does no work between
documents. On a GPU otherwise FlexAttention (Dong et al. 2024, arXiv 2412.05496), a generated kernel that
skips the empty blocks of a mask. Everywhere else, and where these do not prove themselves on the device, a
dense boolean mask (B, 1, T, T) for scaled_dot_product_attention.
B rows, T tokens, H heads, K key/value heads, D head_dim, N documents of all rows.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_log = logging.getLogger("mobilellm")

WAYS = ("varlen", "flex")
"""Of a GPU, the one tried first being the faster one on Hopper by all that is published; benchmarks/gpu.sh
measures them beside each other."""
_NAMES = {"varlen": "FlashAttention over documents", "flex": "FlexAttention"}
_BLOCK = 128
"""Queries and keys of a block of FlexAttention's mask."""
_TOKENS_A_DOCUMENT = 256
"""Batches of longer documents on average all have one number of bounds, and compile once."""


class Documents(NamedTuple):
    """Where documents begin and end if all rows stand in one line of B * T tokens: for `varlen_attn`."""

    bounds: Tensor
    """(N + 1,) int32, from 0 to B * T; behind the last document empty ones, so that few lengths occur."""
    longest: int
    """Tokens that no document exceeds."""
    tell_groups: bool
    """Whether the `varlen_attn` of this torch wants to be told of heads that share keys and values."""


def document_starts(segments: Tensor) -> Tensor:
    """Where the document of every token begins in its row: (B, T) positions."""
    columns = torch.arange(segments.shape[1], device=segments.device)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(new, columns, 0).cummax(dim=1).values


def segmented_view(
    segments: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | BlockMask | Documents]:
    """Positions (B, T) and mask of rows whose documents `segments` (B, T) numbers, for `device`.

    `dtype` is that of the products there. Segments on the CPU, whatever the device, save a GPU the wait for
    the number of documents.
    """
    starts, columns = document_starts(segments), torch.arange(segments.shape[1], device=device)
    way = way_to_attend(device, dtype)
    documents = pack(starts, device) if way == "varlen" else None
    starts = _sent(starts, device)
    if documents is not None:
        return columns - starts, documents
    if way == "flex":
        return columns - starts, block_mask(starts)
    return columns - starts, dense_mask(starts)


def dense_mask(starts: Tensor) -> Tensor:
    """(B, 1, T, T), True where a token may look: from the start (B, T) of its document to itself."""
    columns = torch.arange(starts.shape[1], device=starts.device)
    return ((columns >= starts[..., None]) & (columns <= columns[:, None]))[:, None]


def pack(starts: Tensor, device: torch.device) -> Documents:
    """The documents of rows whose tokens belong to such `starts` (B, T), for `device`."""
    B, T = starts.shape
    firsts = torch.nonzero((starts == torch.arange(T, device=starts.device)).flatten())[:, 0]
    room = max(64, B * T // _TOKENS_A_DOCUMENT)
    while room < len(firsts):
        room *= 2
    bounds = torch.full((room + 1,), B * T, dtype=torch.int32, device=starts.device)
    bounds[: len(firsts)] = firsts
    return Documents(_sent(bounds, device), T, _tells_groups())


def block_mask(starts: Tensor) -> BlockMask:
    """FlexAttention's mask: no token looks before the start (B, T) of its document, or after itself.

    Which blocks are empty, and which have no edge in them, follows from the starts at their ends: what torch
    itself would ask of the whole mask (B, T, T).
    """
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query])

    T, device = starts.shape[1], starts.device
    first = torch.arange(0, T, _BLOCK, device=device)  # query of a block, and key
    last = (first + _BLOCK - 1).clamp(max=T - 1)
    seen = (first <= first[:, None]) & (last >= starts[:, first, None])  # (B, blocks, blocks)
    whole = (last < first[:, None]) & (first >= starts[:, last, None]) & (first + _BLOCK <= T)[:, None]
    mask: BlockMask = BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(T, T)
    )
    return mask


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row count, (B, 1, blocks), and their numbers, those that count first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def attend_apart(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Documents) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, T, D); queries and keys take the dtype of the values."""
    return _through_line(q, k, v, mask) if isinstance(mask, Documents) else _in_blocks(q, k, v, mask)


def _through_line(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, D = q.shape
    groups: dict[str, Any] = {"enable_gqa": True} if documents.tell_groups and k.shape[1] != H else {}
    # Laid out before they are rounded: the other way round the compiler rounds them into (B, H, T, D) first.
    q, k, v = (part.transpose(1, 2).reshape(B * T, -1, D).to(v.dtype) for part in (q, k, v))
    bounds, longest = documents.bounds, documents.longest
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **groups)
    result: Tensor = out.view(B, T, H, D).transpose(1, 2)
    return result


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    on_gpu = q.device.type == "cuda"
    function: Any = _compiled_flex() if on_gpu and not torch.compiler.is_compiling() else flex_attention
    q, k = q.to(v.dtype), k.to(v.dtype)
    out: Tensor = function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out


def way_to_attend(device: torch.device, dtype: torch.dtype) -> str:
    """varlen, flex or dense: the first that works there."""
    half = dtype in (torch.bfloat16, torch.float16)
    for way in WAYS if device.type == "cuda" else ():
        if (half or way != "varlen") and works(way, device):
            return way
    return "dense"


@functools.cache
def works(way: str, device: torch.device) -> bool:
    """Whether it gives on this GPU what the dense mask gives, gradients too: tried out once."""
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            good = _agrees(way, device)
    except Exception as error:  # no triton, an old GPU or torch, a compiler that fails
        reason = " ".join(str(error).split())[:200]
        _log.warning("document masks: %s does not run on %s (%s)", _NAMES[way], device, reason)
        return False
    if not good:
        _log.warning("document masks: %s computes something else on %s; not used", _NAMES[way], device)
    return good


def _agrees(way: str, device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64), (2, 4, 256, 64))
    q, k, v, direction = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
        for shape in shapes
    )
    columns = torch.arange(256, device=device)
    starts = torch.stack((columns // 100 * 100, columns // 37 * 37))
    ours = attend_apart(q, k, v, pack(starts, device) if way == "varlen" else block_mask(starts))
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(starts), enable_gqa=True)
    pairs = [(ours, theirs)]
    pairs += zip(*(torch.autograd.grad(out, (q, k, v), direction) for out in (ours, theirs)), strict=True)
    return all(torch.allclose(a.float(), b.float(), atol=0.05, rtol=0.05) for a, b in pairs)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`; to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.cache
def _tells_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = torch.compile(flex_attention)
    return function  # type: ignore[no-any-return]
