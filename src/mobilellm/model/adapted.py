"""A linear layer with a LoRA or DoRA adapter of `peft` around it, taken apart."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mobilellm.model.projection import Adapter


class AdaptedLinear(NamedTuple):
    linear: nn.Module
    adapter: Adapter
    tensors: tuple[Tensor, ...]  # A, B, and m where there is a magnitude


def adapted_linear(part: nn.Module) -> AdaptedLinear | None:
    """The parts of what peft made of a linear layer; None where it made nothing, or something else than the
    one active adapter that a `projection.Adapter` describes."""
    if not is_adapted(part) or has_hooks(part):
        return None
    layer: Any = part
    names = list(layer.active_adapters)
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged or layer.disable_adapters:
        return None
    (name,) = names
    low, high, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    magnitude = layer.lora_magnitude_vector[name] if layer.use_dora[name] else None
    tensors = (low.weight, high.weight, *(() if magnitude is None else (magnitude.weight,)))
    share = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    further = layer.lora_bias[name] or (magnitude is None and name in layer.lora_variant)
    if further or not all(map(_is_float, tensors)):
        return None
    return AdaptedLinear(
        layer.base_layer, Adapter(layer.scaling[name], share, magnitude is not None), tensors
    )


def is_adapted(part: nn.Module) -> bool:
    """Whether it is peft's LoRA around a linear layer: it can only be where peft was imported."""
    peft = sys.modules.get("peft.tuners.lora")
    return peft is not None and type(part) is peft.Linear


def has_hooks(part: nn.Module) -> bool:
    return bool(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    )


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()
