"""How much a model's predictions depend on the output of each product, token by token.

Near the source KL(source, quantised) is a quadratic form, Fisher's information: squared gradients of the
log-likelihood of tokens that are drawn from the model itself. Where they are large an error costs more, and
counts more in GPTQ's H (after GuidedQuant, Kim et al. 2025, arXiv 2505.07004, with one group of outputs).
T tokens of a window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model.transformer import Linear, MobileLLM

Uses = list[Tensor]
"""(T,) for each use of a product in a window, in the order of the uses."""
_ROWS_AT_ONCE = 512


def sensitivities(
    model: MobileLLM, windows: Sequence[Tensor], progress: Callable[[str, int, int], None]
) -> dict[str, list[Uses]]:
    """By the name of a matrix of the blocks, for every window: squared gradients summed over the outputs.

    `windows` are token ids (T,). Divided by their mean over all tokens and uses. The embedding's gradient is
    cleared.
    """
    found: dict[str, list[Uses]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    embedding = model.model.embed_tokens.weight
    required = [parameter.requires_grad for parameter in model.parameters()]
    linears = {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, Linear)}
    linears.pop("lm_head.weight", None)
    noted: dict[str, Uses] = defaultdict(list)
    handles = [part.register_forward_hook(_noting(noted[name])) for name, part in linears.items()]
    try:
        model.requires_grad_(False)
        embedding.requires_grad_(True)  # all outputs must depend on something that wants a gradient
        for number, window in enumerate(windows):
            progress("windows looked at", number, len(windows))
            _run_backward(model, window, generator)
            for name, gradients in noted.items():
                found[name].append(gradients[::-1])  # backward meets the last use first
                gradients.clear()
            embedding.grad = None
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(before)
    return {name: _with_mean_one(each) for name, each in found.items()}


def _noting(noted: Uses) -> Callable[[nn.Module, tuple[Tensor], Any], None]:
    def note(part: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        output.register_hook(lambda gradient: noted.append(gradient[0].square().sum(-1)))

    return note


def _run_backward(model: MobileLLM, window: Tensor, generator: torch.Generator) -> None:
    """From the log-likelihood of tokens drawn from the model's own distributions."""
    hidden: Any = model.hidden(window[None])[0]
    states: Any = hidden.detach().requires_grad_(True)
    for rows in torch.split(states, _ROWS_AT_ONCE):
        logits = F.linear(rows, model.head_weight.detach())
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss: Any = F.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()
    hidden.backward(states.grad)


def _with_mean_one(windows: list[Uses]) -> list[Uses]:
    mean = torch.cat([use for uses in windows for use in uses]).mean()
    return [[use / mean if mean > 0 else torch.ones_like(use) for use in uses] for uses in windows]
