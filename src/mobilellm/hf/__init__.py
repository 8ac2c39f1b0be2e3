"""The transformers face of MobileLLM. Importing it is what makes the Auto classes know the models:

    import mobilellm.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

loads the official directories as they are, without executing the code that lies in them.
"""

from mobilellm.installation import install_command, missing_packages

if _missing := missing_packages("torch", "transformers"):
    raise ImportError(
        f"mobilellm.hf needs {' and '.join(_missing)}; install with: {install_command('hf')}",
        name=_missing[0],
    )

from mobilellm.hf.auto_classes import register
from mobilellm.hf.configuration_mobilellm import MobileLLMConfig
from mobilellm.hf.convert import from_mobilellm, to_mobilellm
from mobilellm.hf.modeling_mobilellm import MobileLLMForCausalLM, MobileLLMModel
from mobilellm.hf.tokenization import load_tokenizer

__all__ = [
    "MobileLLMConfig",
    "MobileLLMForCausalLM",
    "MobileLLMModel",
    "from_mobilellm",
    "load_tokenizer",
    "register",
    "to_mobilellm",
]

register()
