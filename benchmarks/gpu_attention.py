"""Attention alone, by every way there is: milliseconds of one layer. For workers of `gpu.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_training import MEAN_DOCUMENT, Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mobilellm.model.document_mask import attend_apart, block_mask, dense_mask, pack
from mobilellm.presets import preset

TOKENS = 2**15
"""Of a batch: enough to fill a GPU, and a dense mask that fits beside it."""
ROUNDS, WARM_UP = 15, 4


def attention(size: str, shape: Shape) -> dict[str, Any]:
    """Forward, and forward and backward, of causal attention, and of documents of 500 tokens on average.

    `share_of_causal` is the work that documents leave of it.
    """
    config, T, device = preset(size), shape.length, shape.device
    on_gpu = device.type == "cuda"
    B = max(1, (TOKENS if on_gpu else 4 * T) // T)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    q, k, v, direction = (
        torch.randn(B, T, count, config.head_dim, device=device, dtype=dtype, generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for count in heads
    )
    new = torch.from_numpy(np.random.default_rng(0).random((B, T)) < 1 / MEAN_DOCUMENT)
    starts = torch.where(new, torch.arange(T), 0).cummax(1).values
    lengths = (torch.arange(T) - starts + 1).double()
    there = starts.to(device)
    ways: dict[str, Callable[[], Tensor]] = {
        "causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "documents, dense": lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=dense_mask(there), enable_gqa=True
        ),
    }
    if on_gpu:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            ways[f"causal, {name}"] = _by(backend, ways["causal"])
        documents, blocks = pack(starts, device), block_mask(there)
        ways["documents, varlen"] = lambda: attend_apart(q, k, v, documents)
        ways["documents, flex"] = lambda: attend_apart(q, k, v, blocks)
    flops = 4 * B * config.num_heads * config.head_dim * T * (T + 1) / 2
    out: dict[str, Any] = {"batch": B, "length": T, "heads": list(heads[:2]), "head_dim": config.head_dim}
    out["share_of_causal"] = round(float(lengths.sum()) / (B * T * (T + 1) / 2), 3)
    for name, way in ways.items():
        try:
            forward = _milliseconds(lambda way=way: way(), device)
            both = _milliseconds(lambda way=way: torch.autograd.grad(way(), (q, k, v), direction), device)
        except Exception as error:
            out[name] = {"failed": " ".join(str(error).split())[:200]}
            continue
        out[name] = {"forward_ms": round(forward, 3), "both_ms": round(both, 3)}
        if name.startswith("causal"):
            out[name]["tflops"] = round(3.5 * flops / both / 1e9, 1)
    if on_gpu:
        out["making_masks_ms"] = {
            "varlen": round(_milliseconds(lambda: pack(starts, device), device), 3),
            "flex": round(_milliseconds(lambda: block_mask(there), device), 3),
            "dense": round(_milliseconds(lambda: dense_mask(there), device), 3),
        }
    return out


def _by(backend: SDPBackend, way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def only() -> Tensor:
        with sdpa_kernel(backend):
            return way()

    return only


def _milliseconds(action: Callable[[], Any], device: torch.device) -> float:
    """The median of several calls, each timed on the device."""
    for _ in range(WARM_UP):
        action()
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            action()
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended))
        else:
            started = time.perf_counter()
            action()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
