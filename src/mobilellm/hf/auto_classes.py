"""Make the Auto classes of transformers know MobileLLM."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from mobilellm.hf.configuration_mobilellm import MobileLLMConfig
from mobilellm.hf.modeling_mobilellm import MobileLLMForCausalLM, MobileLLMModel
from mobilellm.hf.tokenization import LlamaTokenizer


def register() -> None:
    """Register config, models and tokenizer. `import mobilellm.hf` calls it; a second call changes nothing.

    Classes registered by a program go before code in a model directory, even with trust_remote_code=True.
    """
    AutoConfig.register("mobilellm", MobileLLMConfig, exist_ok=True)
    AutoModel.register(MobileLLMConfig, MobileLLMModel, exist_ok=True)
    AutoModelForCausalLM.register(MobileLLMConfig, MobileLLMForCausalLM, exist_ok=True)
    AutoTokenizer.register(MobileLLMConfig, LlamaTokenizer, exist_ok=True)
    # save_pretrained puts the files of these classes beside the weights and names them in config.json.
    MobileLLMConfig.register_for_auto_class("AutoConfig")
    MobileLLMModel.register_for_auto_class("AutoModel")
    MobileLLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
