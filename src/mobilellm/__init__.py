"""Deep-and-thin language models below a billion parameters: train, evaluate, shrink, run.

    import mobilellm

    loaded = mobilellm.load("runs/quickstart")  # a model directory, a training run, or a Hub id
    (completion,) = mobilellm.generate(loaded, "The function returns", max_new_tokens=40)
    print(completion.text)

Without torch, from a .gguf file: `mobilellm.runtime.load`. The public names load lazily, so that `import
mobilellm` costs nothing and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig as ModelConfig
    from mobilellm.model.api import LoadedModel as LoadedModel
    from mobilellm.model.api import generate as generate
    from mobilellm.model.api import load as load
    from mobilellm.model.transformer import MobileLLM as MobileLLM
    from mobilellm.sampling import Sampling as Sampling
    from mobilellm.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "ModelConfig": "mobilellm.config",
    "Sampling": "mobilellm.sampling",
    "Tokenizer": "mobilellm.tokenizer",
    "MobileLLM": "mobilellm.model.transformer",
    "LoadedModel": "mobilellm.model.api",
    "load": "mobilellm.model.api",
    "generate": "mobilellm.model.api",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mobilellm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
