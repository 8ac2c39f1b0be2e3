"""transformers' own Llama of a shape of ours."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from mobilellm.config import ModelConfig


def stock_config(config: ModelConfig, **options: Any) -> LlamaConfig:
    """The stored layers of `config`, executed once each."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        **options,
    )
