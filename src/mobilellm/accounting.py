"""What a model holds and costs, from its ModelConfig alone: parameters, bytes, cache, FLOPs, days to train.

Conventions, once for all functions:
- One multiply-add counts as two floating-point operations (FLOPs). Only matrix products count; norms, rotary
  embedding, softmax, SiLU and the embedding lookup are left out (well below 1 % at the published shapes).
- Layer sharing stores `num_layers` blocks and executes `num_steps` of them: storage counts blocks once,
  execution counts every step.
- A tied head is stored once (as the embedding) and executed once (as the head).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mobilellm.config import ModelConfig

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights by part."""

    embedding: int
    head: int
    attention: int
    ffn: int
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.attention + self.ffn + self.norms

    @property
    def matrices(self) -> int:
        """All weights except the norms'."""
        return self.total - self.norms


def stored_parameters(config: ModelConfig) -> Parameters:
    """Weights kept in memory and in a file, exactly: each block once, a tied head only as the embedding."""
    vocabulary = config.vocab_size * config.hidden_size
    return Parameters(
        embedding=vocabulary,
        head=0 if config.tie_word_embeddings else vocabulary,
        attention=config.num_layers * _attention_weights(config),
        ffn=config.num_layers * _ffn_weights(config),
        norms=(2 * config.num_layers + 1) * config.hidden_size,
    )


def executed_parameters(config: ModelConfig) -> Parameters:
    """Weights that act on one token in a forward pass: every executed step, the final norm and the head.

    The embedding counts nothing: looking up one row multiplies nothing. For a tied model without layer
    sharing the total therefore equals the stored total.
    """
    return Parameters(
        embedding=0,
        head=config.vocab_size * config.hidden_size,
        attention=config.num_steps * _attention_weights(config),
        ffn=config.num_steps * _ffn_weights(config),
        norms=(2 * config.num_steps + 1) * config.hidden_size,
    )


@dataclass(frozen=True)
class BitWidths:
    """Bits per stored weight of each role, the scales of a quantised format included (Q8_0 is 8.5, Q4_0 4.5).

    Raises ValueError unless every width is between 1 and 32.
    """

    linear: float
    embedding: float
    norms: float

    def __post_init__(self) -> None:
        for field in fields(self):
            check_bits(getattr(self, field.name), f"bits of {field.name}")

    @classmethod
    def of_matrices(cls, linear: float, embedding: float | None = None) -> BitWidths:
        """`linear` bits for attention and FFN, `embedding` (default: the same) for embedding and head.

        Norms are kept at 16 bits, or at `linear` where that is more: they are 0.03 % of the weights, and no
        format in use shrinks them further.
        """
        return cls(linear, linear if embedding is None else embedding, max(16.0, linear))


def check_bits(bits: float, name: str = "bits") -> None:
    """Raise ValueError unless 1 <= bits <= 32."""
    if not 1 <= bits <= 32:  # also false for NaN
        raise ValueError(f"{name} = {bits:g} must be between 1 and 32 (16 is fp16 or bf16, 4.5 is Q4_0)")


def bytes_by_part(parameters: Parameters, widths: BitWidths) -> Parameters:
    """Bytes of each part at the given widths, rounded up to whole bytes; `.total` is the weights' size.

    Weights only: a file adds a header of some kilobytes, and alignment.
    """
    return Parameters(
        embedding=_bytes(parameters.embedding, widths.embedding),
        head=_bytes(parameters.head, widths.embedding),
        attention=_bytes(parameters.attention, widths.linear),
        ffn=_bytes(parameters.ffn, widths.linear),
        norms=_bytes(parameters.norms, widths.norms),
    )


def kv_cache_bytes_per_token(config: ModelConfig, bits: float = 16) -> int:
    """Bytes one cached token takes: a key and a value of K heads x D, in one slot per *executed* step.

    Layer sharing saves weights, not cache: each execution of a block has keys and values of its own.
    """
    check_bits(bits, "bits of the KV cache")
    return _bytes(2 * config.num_steps * config.num_kv_heads * config.head_dim, bits)


def attention_flops_per_token(config: ModelConfig, keys: int) -> int:
    """FLOPs of a forward pass's attention products (QK^T and AV) for one query that sees `keys` keys.

    2 products x 2 FLOPs x query width (H x D) x keys, in every executed step (PaLM, arXiv 2204.02311,
    appendix B). Grouped queries do not change it.
    """
    return 4 * config.num_steps * config.num_heads * config.head_dim * keys


def forward_flops_per_token(config: ModelConfig, context: int, attention: bool = True) -> int:
    """FLOPs of a forward pass per token, averaged over a causal window of `context` tokens.

    2N with N the executed matrix weights, head included (Kaplan et al. 2020, arXiv 2001.08361, table 1), plus
    attention over the (context + 1) / 2 keys a token sees on average. `attention=False` leaves it at 2N.
    Raises ValueError for a context below 1.
    """
    if context < 1:
        raise ValueError(f"context = {context} must be at least 1 token")
    weights = 2 * executed_parameters(config).matrices
    return weights + (attention_flops_per_token(config, context + 1) // 2 if attention else 0)


def training_flops_per_token(config: ModelConfig, context: int, attention: bool = True) -> int:
    """FLOPs of a forward and a backward pass per token: three forward passes.

    Backward costs two: one for the gradients of inputs, one for those of weights (Kaplan et al. 2020).
    Without attention this is "6N". Activation recomputation and the optimizer are not counted (model FLOPs,
    not hardware FLOPs: PaLM, appendix B).
    """
    return 3 * forward_flops_per_token(config, context, attention)


def mfu(flops_per_token: float, tokens_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): FLOPs the model needs over those the device could do.

    `tokens_per_second` and `peak_flops` (FLOP/s, dense, of the dtype trained in) are per device, or both of
    all devices. Which convention it is depends on `flops_per_token`: 6N, or 6N with attention.
    """
    check_positive(
        flops_per_token=flops_per_token, tokens_per_second=tokens_per_second, peak_flops=peak_flops
    )
    return flops_per_token * tokens_per_second / peak_flops


def tokens_per_second(flops_per_token: float, peak_flops: float, utilisation: float) -> float:
    """Tokens/s of one device at an MFU of `utilisation`: the inverse of `mfu`."""
    check_positive(flops_per_token=flops_per_token, peak_flops=peak_flops)
    check_utilisation(utilisation)
    return peak_flops * utilisation / flops_per_token


def days_to_train(tokens: float, devices: int, tokens_per_second_per_device: float) -> float:
    """Days for `tokens` on `devices` that scale perfectly and never stop."""
    check_positive(tokens=tokens, devices=devices, tokens_per_second=tokens_per_second_per_device)
    return tokens / (devices * tokens_per_second_per_device) / SECONDS_PER_DAY


def check_utilisation(utilisation: float) -> None:
    """Raise ValueError unless 0 < utilisation <= 1."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"mfu = {utilisation:g} must be above 0 and at most 1, e.g. 0.45")


def check_positive(**values: float) -> None:
    """Raise ValueError naming the first value that is not positive and finite."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} = {value:g} must be positive and finite")


def _attention_weights(config: ModelConfig) -> int:
    """q, k, v and o of one block."""
    return 2 * config.hidden_size * (config.num_heads + config.num_kv_heads) * config.head_dim


def _ffn_weights(config: ModelConfig) -> int:
    """gate, up and down of one block."""
    return 3 * config.hidden_size * config.intermediate_size


def _bytes(count: int, bits: float) -> int:
    return math.ceil(count * bits / 8)
