"""The config.json of the official checkpoints, key for key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OFFICIAL: dict[str, Any] = {  # MobileLLM-125M
    "architectures": ["MobileLLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_sharing": False,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "mobilellm",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "share_embedding": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32000,
}


def as_llama(values: Mapping[str, Any]) -> dict[str, Any]:
    """As MobileLLM-1.5B has it: a plain untied Llama without auto_map and head_dim."""
    left_out = ("auto_map", "layer_sharing", "share_embedding", "head_dim")
    kept = {key: value for key, value in values.items() if key not in left_out}
    return kept | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


LLAMA = as_llama(OFFICIAL) | {
    "hidden_size": 1600,
    "intermediate_size": 4352,
    "num_hidden_layers": 54,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
}
