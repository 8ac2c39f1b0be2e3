"""What quantisation cost: the quantised model beside its source, on the same text.

KL is of the next token's distribution, source against quantised, in nats a token; top-1 agreement is how
often both have the same likeliest token. Perplexity is over windows that overlap by one token, so that every
token but the first is predicted once.
T tokens of a window, V vocab_size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilellm.eval import protocols
from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.protocols import Unit
from mobilellm.model.fused import fuse
from mobilellm.model.scoring import states_at
from mobilellm.model.transformer import Linear, MobileLLM

_LOGITS_AT_ONCE = 2**24
"""Elements of float32 logits of one model held at a time: 64 MiB."""
_TOKENS_FOR_ERRORS = 2_048


@dataclass(frozen=True)
class Comparison:
    """Sums over all predicted tokens; errors by matrix."""

    tokens: int
    bytes: int
    source_nats: float
    quantized_nats: float
    kl_nats: float
    agreed: int
    errors: dict[str, float]
    """||(Q - W) x|| / ||W x|| of every product on the text, the rounding of x included; of a matrix used
    several times, over all its uses."""

    @property
    def source_perplexity(self) -> float:
        return math.exp(min(self.source_nats / self.tokens, 700))

    @property
    def quantized_perplexity(self) -> float:
        return math.exp(min(self.quantized_nats / self.tokens, 700))

    @property
    def kl(self) -> float:
        return self.kl_nats / self.tokens

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens

    def worst(self, count: int) -> list[tuple[str, float]]:
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]

    def to_dict(self) -> dict[str, Any]:
        bits = 1 / math.log(2) / self.bytes
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "source": {"perplexity": self.source_perplexity, "bits_per_byte": self.source_nats * bits},
            "quantized": {
                "perplexity": self.quantized_perplexity,
                "bits_per_byte": self.quantized_nats * bits,
            },
            "perplexity_ratio": self.quantized_perplexity / self.source_perplexity,
            "kl": self.kl,
            "top1_agreement": self.agreement,
            "errors": self.errors,
        }


def windows(model: LanguageModel, texts: Sequence[str], window: int, tokens: int) -> list[Unit]:
    """Windows to compare on: of all texts together about `tokens`, spread evenly over them.

    Raises ValueError for a text without tokens to predict.
    """
    units = [unit for text in texts for unit in protocols.sliding(model, text, window, window - 1)]
    wanted = max(1, round(tokens / (window - 1)))
    if wanted >= len(units):
        return units
    return [units[int((number + 0.5) * len(units) / wanted)] for number in range(wanted)]


class Judge:
    """Compares quantised models with one source, whose states are computed once."""

    def __init__(self, source: MobileLLM, units: Sequence[Unit]) -> None:
        """`units` as `windows` gives them."""
        self._source, self._units = source, units
        self._states: list[Tensor] = []

    @torch.inference_mode()
    def __call__(
        self, quantized: MobileLLM, progress: Callable[[int, int], None] | None = None
    ) -> Comparison:
        """`progress`: tokens predicted, of how many."""
        total = sum(len(unit.requests[0].continuation) for unit in self._units)
        sums: dict[str, float] = defaultdict(float)
        done = 0
        for number, unit in enumerate(self._units):
            if number == len(self._states):
                self._states.append(_states(self._source, unit))
            targets = torch.tensor(unit.requests[0].continuation)
            models = ((self._source, self._states[number]), (quantized, _states(quantized, unit)))
            at_once = max(1, _LOGITS_AT_ONCE // quantized.config.vocab_size)
            for rows in torch.split(torch.arange(len(targets)), at_once):
                a, b = (
                    model.logits(states[rows], model.inference_layout).float().log_softmax(-1)
                    for model, states in models
                )
                sums["source"] -= float(a.gather(1, targets[rows, None]).sum())
                sums["quantized"] -= float(b.gather(1, targets[rows, None]).sum())
                sums["kl"] += float((a.exp() * (a - b)).sum())
                sums["agreed"] += int((a.argmax(-1) == b.argmax(-1)).sum())
            done += len(targets)
            if progress is not None:
                progress(done, total)
        size = sum(unit.bytes for unit in self._units)
        errors = matrix_errors(self._source, quantized, self._units)
        return Comparison(
            total, size, sums["source"], sums["quantized"], sums["kl"], int(sums["agreed"]), errors
        )


@torch.inference_mode()
def matrix_errors(source: MobileLLM, quantized: MobileLLM, units: Sequence[Unit]) -> dict[str, float]:
    """The relative error of every product, each with the input it has in the source. As in `Comparison`."""
    lost: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    ours = dict(quantized.named_modules())

    def note(name: str, exact: Tensor, found: Tensor) -> None:
        lost[name] += float((found - exact).float().square().sum())
        whole[name] += float(exact.float().square().sum())

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda part, inputs, exact: note(f"{name}.weight", exact, ours[name](inputs[0]))

    parts = [(name, part) for name, part in source.model.named_modules() if isinstance(part, Linear)]
    handles = [part.register_forward_hook(hook(f"model.{name}")) for name, part in parts]
    head = "model.embed_tokens.weight" if source.lm_head is None else "lm_head.weight"
    at_once = max(1, _LOGITS_AT_ONCE // source.config.vocab_size)
    try:
        seen = 0
        for unit in units:
            if seen >= _TOKENS_FOR_ERRORS:
                break
            (request,) = unit.requests
            ids = torch.tensor([[*request.context, *request.continuation]])[:, :_TOKENS_FOR_ERRORS]
            hidden = source.hidden(ids)[0]
            for part in torch.split(hidden, at_once):
                note(head, source.logits(part), quantized.logits(part))
            seen += ids.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: math.sqrt(lost[name] / whole[name]) if whole[name] else 0.0 for name in lost}


def _states(model: MobileLLM, unit: Unit) -> Tensor:
    """Final states (T, E) that predict the continuation of a window."""
    (request,) = unit.requests
    ids = torch.tensor([[*request.context, *request.continuation[:-1]]])
    model.inference_layout = fuse(model, reuse=model.inference_layout)
    count = ids.shape[1]
    wanted = torch.arange(len(request.context) - 1, count)
    return states_at(model, model.inference_layout, ids, torch.arange(count)[None], None, wanted)
