"""How much a model's predictions depend on the output of each product, token by token, and on the embedding.

Near the source KL(source, quantised) is a quadratic form, Fisher's information: squared gradients of the
log-likelihood of tokens that are drawn from the model itself. Where they are large an error costs more, and
counts more in GPTQ's H (after GuidedQuant, Kim et al. 2025, arXiv 2505.07004, with one group of outputs).
At the logits Fisher's information is diag(p) - p pᵀ, of which the diagonal is kept: p (1 - p) for each token
of the vocabulary. At what is looked up in the embedding it is g gᵀ, with g the gradient there.
T tokens of a window, E hidden_size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model.transformer import Linear, MobileLLM

Uses = list[Tensor]
"""(T,) for each use of a product in a window, in the order of the uses."""
_ROWS_AT_ONCE = 512


class Sensitivities(NamedTuple):
    """Those of head and embedding are in one unit: together they are H of a tied matrix."""

    products: dict[str, list[Uses]]
    """By the name of a matrix of the blocks, for every window: squared gradients summed over the outputs,
    divided by their mean over all tokens and uses."""
    head: list[Tensor]
    """(T,) for every window: the sum of p (1 - p) over the vocabulary."""
    embedding: Tensor
    """(E, E): the sum of g gᵀ over all tokens."""


def sensitivities(
    model: MobileLLM, windows: Sequence[Tensor], progress: Callable[[str, int, int], None]
) -> Sensitivities:
    """`windows` are token ids (T,). The embedding's gradient is cleared."""
    found: dict[str, list[Uses]] = defaultdict(list)
    head: list[Tensor] = []
    looked_up = torch.zeros(model.config.hidden_size, model.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    embedding = model.model.embed_tokens.weight
    required = [parameter.requires_grad for parameter in model.parameters()]
    linears = {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, Linear)}
    linears.pop("lm_head.weight", None)
    noted: dict[str, Uses] = defaultdict(list)
    handles = [part.register_forward_hook(_noting(noted[name])) for name, part in linears.items()]
    first = model.model.layers[model.config.schedule[0]]
    handles.append(first.register_forward_pre_hook(_adding(looked_up)))
    try:
        model.requires_grad_(False)
        embedding.requires_grad_(True)  # all outputs must depend on something that wants a gradient
        for number, window in enumerate(windows):
            progress("windows looked at", number, len(windows))
            head.append(_run_backward(model, window, generator))
            for name, gradients in noted.items():
                found[name].append(gradients[::-1])  # backward meets the last use first
                gradients.clear()
            embedding.grad = None
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(before)
    return Sensitivities({name: _with_mean_one(each) for name, each in found.items()}, head, looked_up)


def _noting(noted: Uses) -> Callable[[nn.Module, tuple[Tensor], Any], None]:
    def note(part: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        output.register_hook(lambda gradient: noted.append(gradient[0].square().sum(-1)))

    return note


def _adding(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Adds g gᵀ of what the first step of a pass is given: the rows looked up."""

    def add(gradient: Tensor) -> None:
        total.addmm_(gradient[0].T, gradient[0])

    def note(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, _, _, _, step, *_ = inputs
        if step == 0:  # and not a later use of a shared block
            x.register_hook(add)

    return note


def _run_backward(model: MobileLLM, window: Tensor, generator: torch.Generator) -> Tensor:
    """From the log-likelihood of tokens drawn from the model's own distributions p.

    Returns the sums of p (1 - p), (T,).
    """
    hidden: Any = model.hidden(window[None])[0]
    states: Any = hidden.detach().requires_grad_(True)
    spread = []
    for rows in torch.split(states, _ROWS_AT_ONCE):
        logits = F.linear(rows, model.head_weight.detach())
        p = logits.detach().softmax(-1)
        spread.append(1 - p.square().sum(-1))
        drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
        loss: Any = F.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()
    hidden.backward(states.grad)
    return torch.cat(spread)


def _with_mean_one(windows: list[Uses]) -> list[Uses]:
    mean = torch.cat([use for uses in windows for use in uses]).mean()
    return [[use / mean if mean > 0 else torch.ones_like(use) for use in uses] for uses in windows]
