"""What a block keeps for the backward pass, in bytes, counted from the operators of three ways through it.

They are the kernels for training on a CPU in bfloat16 (`model/training_steps.py`), the plain modules, and
those modules with adapters beside frozen weights, as `peft` computes them. E hidden_size, F
intermediate_size.
"""

from __future__ import annotations

from mobilellm.config import ModelConfig
from mobilellm.train.lora import LoraChoice, target_shape

_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Matrices by what goes into them: matrices that share an input can share what they keep of it."""


def plain_bytes(config: ModelConfig, width: int, compiled: bool) -> int:
    """A token's, of one executed block of the plain modules; `width` bytes a number in products.

    Inputs of the matrix products, of SiLU and the product after it, queries, keys, values and output of
    attention, inputs of the norms in float32. Without the compiler each product keeps an input of its own in
    bfloat16, and a norm its normalised input too; the compiler keeps one of each and recomputes what is
    cheap.
    """
    E, F = config.hidden_size, config.intermediate_size
    norms = 8  # a float32 a norm
    if compiled:
        return 4 * E + 3 * width * E + _attention(config, width) + 3 * width * F + norms
    inputs = 5 if width == 2 else 2  # in float32 q, k, v and gate, up share theirs
    return 16 * E + inputs * width * E + _attention(config, width) + 4 * width * F + norms


def kernel_bytes(config: ModelConfig, lora: LoraChoice | None) -> int:
    """A token's, of one executed block by the kernels: both inputs of norms, what attention was made of and
    gave, gate and up; of an adapter x Aᵀ, a mask for an input with dropout, outputs that have magnitudes."""
    E, F = config.hidden_size, config.intermediate_size
    kept = 4 * E + _attention(config, 2) + 4 * F + 8
    for group in _INPUTS:
        adapted = () if lora is None else tuple(name for name in group if name in lora.targets)
        if lora is None or not adapted:
            continue
        kept += 2 * lora.rank * len(adapted)
        kept += target_shape(group[0], config)[1] if lora.dropout else 0
        if lora.dora and group[0] != "gate_proj":  # of gate and up they are kept in any case
            kept += 2 * sum(target_shape(name, config)[0] for name in group)
    return kept


def adapted_bytes(config: ModelConfig, lora: LoraChoice, width: int, on_gpu: bool) -> int:
    """A token's, of one executed block of plain modules with adapters. What is frozen keeps no input."""
    E, F = config.hidden_size, config.intermediate_size
    rows, columns = zip(*(target_shape(name, config) for name in lora.targets), strict=True)
    kept = 8 * E + _attention(config, width) + 3 * width * F + 8 + width * lora.rank * len(lora.targets)
    if width == 2 or lora.dropout:  # every adapter has a copy of its input
        kept += width * sum(columns)
    else:
        inputs = [group for group in _INPUTS if set(group) & set(lora.targets) and group != ("o_proj",)]
        kept += width * sum(target_shape(group[0], config)[1] for group in inputs)
    kept += (
        (1 if on_gpu else 4) * sum(columns) if lora.dropout else 0
    )  # masks: torch's own on a GPU are bytes
    return kept + (2 * width * sum(rows) if lora.dora else 0)  # what came of the matrix and of the adapter


def adapted_copies(config: ModelConfig, lora: LoraChoice, width: int) -> int:
    """Bytes of the copies of weights that plain modules with adapters make in all executed blocks: autocast
    keeps none of a frozen weight, so that each run makes its own; DoRA in `peft` multiplies with another."""
    sizes = {name: rows * columns for name in _ALL for rows, columns in [target_shape(name, config)]}
    copies = sum(sizes.values()) * (width if width == 2 else 0)
    if lora.dora:
        copies += (2 if lora.dropout else 1) * width * sum(sizes[name] for name in lora.targets)
    return config.num_steps * copies


_ALL = tuple(name for group in _INPUTS for name in group)


def _attention(config: ModelConfig, width: int) -> int:
    """Queries, keys, values and output, and a float32 a query."""
    return 2 * width * (config.num_heads + config.num_kv_heads) * config.head_dim + 4 * config.num_heads
