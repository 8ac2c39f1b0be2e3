"""Between our model and the transformers one: the same weights, not copies of them."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mobilellm.hf.configuration_mobilellm import MobileLLMConfig
from mobilellm.hf.modeling_mobilellm import HEAD, MobileLLMForCausalLM
from mobilellm.layouts import config_json, parse_config
from mobilellm.model.transformer import MobileLLM


def from_mobilellm(model: MobileLLM) -> MobileLLMForCausalLM:
    """A transformers model on the very parameters of `model`: training one trains the other."""
    weight = model.head_weight
    config = MobileLLMConfig(
        **config_json(model.config, "mobilellm", str(weight.dtype).removeprefix("torch."))
    )
    with torch.device("meta"):
        face = MobileLLMForCausalLM(config)
    missing, unexpected = face.load_state_dict(dict(model.named_parameters()), strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= {HEAD}
    face.tie_weights()
    face.model.rotary_emb = LlamaRotaryEmbedding(config).to(weight.device)  # a table, not a parameter
    face.train(model.training)
    return face


def to_mobilellm(model: PreTrainedModel) -> MobileLLM:
    """Our model on the very parameters of a MobileLLMForCausalLM or a stock LlamaForCausalLM.

    Raises ConfigError or ValueError for what our model does not compute, e.g. adapters that are not merged.
    """
    described = parse_config(json.loads(model.config.to_json_string()), type(model).__name__)
    with torch.device("meta"):
        ours = MobileLLM(described.config)
    try:
        ours.load_state_dict(dict(model.named_parameters()), strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(model).__name__}: not the parameters of its config ({reason})") from None
    return ours.train(model.training)
