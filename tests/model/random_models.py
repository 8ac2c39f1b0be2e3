"""Random models whose activations are of order one, and the stock transformers model of the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mobilellm.config import ModelConfig
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from stock_llama import stock_config

TINY = replace(preset("test"), vocab_size=101, num_layers=3)
SHARED = [  # every order with every number of repeats
    ("immediate", 1),
    *((order, repeats) for order in ("immediate", "all-over", "reverse") for repeats in (2, 3, 4)),
]


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> MobileLLM:
    """Weights of deviation 1 / sqrt(inputs), norms around one: logits differ by far more than a tolerance."""
    generator = torch.Generator().manual_seed(seed)
    model = MobileLLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(noise * scale + (parameter.ndim == 1))
        model.model.embed_tokens.weight *= config.hidden_size**0.5 / 4
    return model.to(dtype)


def shared_model(order: str, repeats: int, layers: int = 3, **changes: Any) -> MobileLLM:
    return random_model(replace(TINY, num_layers=layers, order=order, repeats=repeats, **changes))


def some_tokens(vocab_size: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def stock_llama(config: ModelConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """transformers' own Llama holding these very tensors (of `config`'s layers, executed once each)."""
    wanted = stock_config(config, attn_implementation="sdpa")
    with torch.device("meta"):
        stock = LlamaForCausalLM(wanted)
    stock = stock.to_empty(device="cpu")
    rotary = type(stock.model.rotary_emb)
    stock.model.rotary_emb = rotary(wanted)  # its table is no parameter and is empty now
    missing, unexpected = stock.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    stock.tie_weights()
    return stock.eval()


def stock_twin(model: MobileLLM, schedule: tuple[int, ...]) -> LlamaForCausalLM:
    """A stock Llama in which block `schedule[i]` of `model` is copied into layer i."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".layers." not in name:
            tensors[name] = tensor
            continue
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        for step, block in enumerate(schedule):
            if block == int(index):
                tensors[f"model.layers.{step}.{rest}"] = tensor
    unrolled = replace(model.config, num_layers=len(schedule), repeats=1, order="immediate")
    return stock_llama(unrolled, tensors)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """float32 logits of the same function, summed in another order; they differ by around 1 among themselves."""
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
