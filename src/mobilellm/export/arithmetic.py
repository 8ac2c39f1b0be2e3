"""The reference arithmetic: our model in PyTorch, weights and inputs of matrices rounded by a scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mobilellm.export.questions import Floats
from mobilellm.model.transformer import MobileLLM

Rounding = Callable[[Tensor], Tensor]


def float_logits(model: MobileLLM, tokens: Sequence[int]) -> Floats:
    """Logits (T, V) of token ids, float32."""
    with torch.inference_mode():
        logits: Floats = model(torch.tensor([list(tokens)]))[0].float().numpy()
    return logits


def rounded_logits(
    model: MobileLLM, tokens: Sequence[int], inputs: Callable[[str], Rounding | None]
) -> Floats:
    """The same where each matrix sees its input rounded by `inputs` (name of its weight), if any.

    The head's name is that of the embedding where they are tied.
    """
    hooks = [
        module.register_forward_pre_hook(lambda _, given, rounding=rounding: (rounding(given[0]),))
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear) and (rounding := inputs(f"model.{name}.weight")) is not None
    ]
    head = inputs("model.embed_tokens.weight" if model.lm_head is None else "lm_head.weight")
    try:
        with torch.inference_mode():
            hidden = model.hidden(torch.tensor([list(tokens)]))
            logits: Floats = model.logits(hidden if head is None else head(hidden))[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return logits
