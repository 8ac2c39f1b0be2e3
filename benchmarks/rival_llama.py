"""The model of the rival in the training benchmarks: transformers' Llama, of a shape of ours."""

from __future__ import annotations

from typing import Any


def llama_of(config: Any) -> Any:
    """A fresh LlamaForCausalLM with as many layers as `config` executes. Imports transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_steps,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            initializer_range=config.initializer_range,
        )
    )
