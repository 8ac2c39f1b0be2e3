"""What a config.json says in every layout found in the wild, to and from ModelConfig.

Layouts (their `model_type`):
  llama      plain Llama. The official 1.5B is one of these, untied. What we write for models without sharing.
  mobilellm  the official remote-code layout (`layer_sharing`, `share_embedding`), and ours, which adds
             `layer_sharing_repeats` and `layer_sharing_order`.
A key that would change the computation and that we do not implement is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mobilellm.config import ConfigError, ModelConfig

MODEL_TYPES = ("llama", "mobilellm")

_DIRECT = {  # config.json key -> ModelConfig field
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
_OPTIONAL = {"initializer_range": "initializer_range", "head_dim": "head_dim"}
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {  # implemented for these values alone
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1, None),
    "rope_scaling": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
}
_SWITCHES = ("tie_word_embeddings", "share_embedding", "layer_sharing")  # true, false, or left out
_HANDLED = {
    "model_type", "rope_theta", "rope_parameters", "layer_sharing_repeats", "layer_sharing_order",
    "layer_types", *_SWITCHES,
}  # fmt: skip
_INERT = {  # bookkeeping that does not change the logits
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "is_llama_config", "label2id", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class ConfigFile:
    """What a config.json says: the architecture, the layout it came in, and what had to be repaired."""

    config: ModelConfig
    model_type: str
    repairs: tuple[str, ...]


def parse_config(values: Mapping[str, Any], source: str = "config.json") -> ConfigFile:
    """Interpret the JSON of a config.json. Raises ConfigError that lists every problem at once."""
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{source}: model_type = {model_type!r} is not one we can run; known are {', '.join(MODEL_TYPES)}"
        )
    problems = _problems(values)
    if problems:
        raise ConfigError(f"{source}: {'; '.join(problems)}")
    fields = {ours: values[theirs] for theirs, ours in _DIRECT.items()}
    fields |= {ours: values[theirs] for theirs, ours in _OPTIONAL.items() if values.get(theirs) is not None}
    if "head_dim" not in fields:
        width, heads = fields["hidden_size"], fields["num_heads"]
        divides = isinstance(width, int) and isinstance(heads, int) and heads > 0
        fields["head_dim"] = width // heads if divides else 0
    fields["rope_theta"] = _rope_theta(values)
    tied, repairs = _tying(values)
    fields["tie_word_embeddings"] = tied
    if values.get("layer_sharing"):
        fields["repeats"] = values.get("layer_sharing_repeats", 2)
        fields["order"] = values.get("layer_sharing_order", "immediate")
    try:
        return ConfigFile(ModelConfig(**fields), model_type, repairs)
    except ConfigError as error:
        raise ConfigError(f"{source}: {_in_file_names(str(error))}") from None


def config_json(config: ModelConfig, model_type: str, dtype: str) -> dict[str, Any]:
    """The config.json of a clean directory. `dtype` is torch's name, e.g. "float32" or "bfloat16".

    Keys are those that both transformers 4 and 5 read (`rope_theta`, not `rope_parameters`; `torch_dtype`).
    Raises ValueError when the layout cannot say what the config says.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"layout {model_type!r} is not known; choose one of {', '.join(MODEL_TYPES)}")
    if model_type == "llama" and config.shares_layers:
        raise ValueError(
            f"layout 'llama' cannot share layers (repeats = {config.repeats}); use 'mobilellm', or --unroll"
        )
    values: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _DIRECT.items()}
    values |= {
        "architectures": ["LlamaForCausalLM" if model_type == "llama" else "MobileLLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "mlp_bias": False,
        "model_type": model_type,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if model_type == "mobilellm":
        values |= {
            "auto_map": {
                "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
                "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
            },
            "layer_sharing": config.shares_layers,
            "layer_sharing_order": config.order,
            "layer_sharing_repeats": config.repeats,
            "share_embedding": config.tie_word_embeddings,
        }
    return dict(sorted(values.items()))


def _problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    missing = sorted(key for key in _DIRECT if values.get(key) is None)
    if _rope_theta(values) is None:
        missing.append("rope_theta")
    if values["model_type"] == "mobilellm":
        missing += [key for key in ("layer_sharing", "share_embedding") if values.get(key) is None]
    if missing:
        problems.append(f"missing keys {missing}")
    known = _DIRECT.keys() | _OPTIONAL.keys() | _ONLY_VALUE.keys() | _HANDLED | _INERT
    if unknown := sorted(set(values) - known):
        problems.append(f"unknown keys {unknown} (they could change the model; remove them if they do not)")
    problems += [
        f"{key} = {values[key]!r} is not supported (only {allowed[0]!r} is)"
        for key, allowed in _ONLY_VALUE.items()
        if key in values and values[key] not in allowed
    ]
    problems += [
        f"{key} = {values[key]!r} must be true or false"
        for key in _SWITCHES
        if values.get(key) is not None and not isinstance(values[key], bool)
    ]
    problems += _rope_problems(values)
    kinds = values.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    ):
        problems.append("layer_types other than 'full_attention' are not supported")
    if values["model_type"] == "llama":
        problems += _llama_problems(values)
    if not values.get("layer_sharing"):
        problems += [
            f"{key} = {values[key]!r} has no meaning without layer_sharing"
            for key, neutral in (("layer_sharing_repeats", 1), ("layer_sharing_order", "immediate"))
            if values.get(key, neutral) != neutral
        ]
    return problems


def _rope_problems(values: Mapping[str, Any]) -> list[str]:
    """The plain rotary embedding may be spelled in two ways, which must agree."""
    rope, theta = values.get("rope_parameters"), values.get("rope_theta")
    if rope is None:
        return []
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0, "rope_theta": None}
    if not isinstance(rope, dict) or not all(
        key in plain and (plain[key] is None or value == plain[key]) for key, value in rope.items()
    ):
        return [f"rope_parameters = {rope!r} is not supported (only rope_theta with rope_type 'default' is)"]
    if theta is not None and rope.get("rope_theta", theta) != theta:
        return [f"rope_theta = {theta!r} disagrees with rope_parameters = {rope!r}; remove the wrong one"]
    return []


def _llama_problems(values: Mapping[str, Any]) -> list[str]:
    """Stock Llama would pass over the two keys of the official layout and compute something else."""
    problems = []
    if values.get("layer_sharing"):
        problems.append("layer_sharing = True needs model_type 'mobilellm' (a llama never shares layers)")
    tied, shared = bool(values.get("tie_word_embeddings")), values.get("share_embedding")
    if shared is not None and bool(shared) != tied:
        problems.append(
            f"share_embedding = {shared!r} disagrees with tie_word_embeddings = {tied}, which a llama obeys; "
            "remove the wrong one"
        )
    return problems


def _in_file_names(message: str) -> str:
    """The message of a ConfigError with the fields called as in config.json."""
    names = {ours: theirs for theirs, ours in (_DIRECT | _OPTIONAL).items()}
    names |= {"repeats": "layer_sharing_repeats", "order": "layer_sharing_order"}
    return re.sub(r"\b(\w+)(?= = )", lambda found: names.get(found[1], found[1]), message)


def _rope_theta(values: Mapping[str, Any]) -> Any:
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # transformers 5
        return rope["rope_theta"]
    return values.get("rope_theta")


def _tying(values: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether the head is the embedding. `share_embedding` is what the official code obeys."""
    stated = bool(values.get("tie_word_embeddings"))
    shared = values.get("share_embedding")
    if shared is None or bool(shared) == stated:
        return stated, ()
    return bool(shared), (
        f"config.json says tie_word_embeddings = {str(stated).lower()} and share_embedding = "
        f"{str(bool(shared)).lower()}: the head is {'tied to' if shared else 'separate from'} the embedding",
    )
