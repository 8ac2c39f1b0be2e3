"""Small random models for the tests of the transformers face, and stock twins of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mobilellm.hf import MobileLLMConfig, MobileLLMForCausalLM

SCHEDULES = {  # of two blocks, written out by hand
    ("immediate", 2): (0, 0, 1, 1),
    ("immediate", 3): (0, 0, 0, 1, 1, 1),
    ("immediate", 4): (0, 0, 0, 0, 1, 1, 1, 1),
    ("all-over", 2): (0, 1, 0, 1),
    ("all-over", 3): (0, 1, 0, 1, 0, 1),
    ("all-over", 4): (0, 1, 0, 1, 0, 1, 0, 1),
    ("reverse", 2): (0, 1, 1, 0),
    ("reverse", 3): (0, 1, 1, 0, 0, 1),
    ("reverse", 4): (0, 1, 1, 0, 0, 1, 1, 0),
}
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # large, so that every block matters to the logits
}


def plain_model(**options: Any) -> MobileLLMForCausalLM:
    torch.manual_seed(0)
    return MobileLLMForCausalLM(MobileLLMConfig(**{**SHAPE, "num_hidden_layers": 2, **options})).eval()


def shared_model(order: str = "immediate", repeats: int = 2, **options: Any) -> MobileLLMForCausalLM:
    sharing = {"layer_sharing": True, "layer_sharing_repeats": repeats, "layer_sharing_order": order}
    return plain_model(**sharing, **options)


def stock_twin(model: MobileLLMForCausalLM, schedule: tuple[int, ...] = (0, 1)) -> LlamaForCausalLM:
    """Transformers' own Llama, with a copied block for every entry of `schedule`."""
    sizes = {name: getattr(model.config, name) for name in SHAPE}
    tied = model.config.tie_word_embeddings
    config = LlamaConfig(**sizes, num_hidden_layers=len(schedule), tie_word_embeddings=tied)
    twin = LlamaForCausalLM(config).eval()
    tensors = model.state_dict()
    for name, parameter in twin.named_parameters():
        source = name
        if name.startswith("model.layers."):
            _, _, step, rest = name.split(".", 3)
            source = f"model.layers.{schedule[int(step)]}.{rest}"
        parameter.data.copy_(tensors[source])
    return twin


def some_tokens(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=generator)
