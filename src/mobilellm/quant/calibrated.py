"""GPTQ over a whole model: blocks one after the other, each with the inputs that the quantised ones give.

A block that runs several times (layer sharing) is quantised once, for the inputs of all its runs. Embedding
and head come first: the head for the final states of the source, the embedding for the gradients at what is
looked up in it. A tied matrix is head and embedding at once, and its H the sum of both.
T tokens of a window, E hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model.quantized import Matrix, attach
from mobilellm.model.rope import rotation
from mobilellm.model.transformer import Linear, MobileLLM
from mobilellm.quant.gptq import gptq
from mobilellm.quant.schemes import Scheme
from mobilellm.quant.sensitivity import Sensitivities, sensitivities

_SAME_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Parts of a block by their input, in the order in which they run: what shares it shares H."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def calibrated(
    source: MobileLLM,
    scheme: Scheme,
    windows: Sequence[Tensor],
    act_order: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, Matrix]:
    """Every matrix that the scheme quantises, by its checkpoint name.

    `windows` are token ids (T,) of calibration text. `progress`: what is done, how much of it, of how much.
    Raises ValueError without a window, and naming a matrix that cannot be quantised.
    """
    if not windows:
        raise ValueError("calibration: there is no text to calibrate on")
    for name, parameter in source.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name}: there are weights that are not finite")
    model = copy.deepcopy(source).float().eval()
    found = sensitivities(model, windows, progress)
    with torch.inference_mode():
        return _Calibration(model, scheme, windows, found, act_order).run(progress)


class _Enough(Exception):  # noqa: N818
    """The last input that is wanted of a window has been seen: the rest of the pass serves nothing."""


class _Calibration:
    """`model` is quantised block by block, in place."""

    def __init__(
        self,
        model: MobileLLM,
        scheme: Scheme,
        windows: Sequence[Tensor],
        found: Sensitivities,
        act_order: bool,
    ) -> None:
        self.formats = scheme.formats(model.config)
        self.model, self.scheme, self.windows = model, scheme, windows
        self.sensitivities, self.act_order = found, act_order
        self.matrices: dict[str, Matrix] = {}

    def run(self, progress: Callable[[str, int, int], None]) -> dict[str, Matrix]:
        schedule = self.model.config.schedule
        blocks = list(dict.fromkeys(schedule))
        self._embedding_and_head()
        attach(self.model, self.scheme.described(0), {name for name, kind in self.formats.items() if kind})
        states = [F.embedding(window[None], self.model.model.embed_tokens.weight) for window in self.windows]
        reached = 0
        for done, index in enumerate(blocks):
            progress("blocks", done, len(blocks))
            uses = [step for step, used in enumerate(schedule) if used == index]
            self._block(index, states, uses)
            following = schedule.index(blocks[done + 1]) if done + 1 < len(blocks) else reached
            for number, x in enumerate(states):
                states[number] = self._advanced(x, reached, following)
            reached = following
        return self.matrices

    def _block(self, index: int, states: list[Tensor], uses: list[int]) -> None:
        """Quantise a block; `states` are those before its first use."""
        for parts in _SAME_INPUT:
            names = [f"model.layers.{index}.{part}.weight" for part in parts]
            if self.formats[names[0]] is None:
                continue
            hessian = self._hessian(names, states, uses)
            for name in names:
                self._quantize(name, self.model.get_parameter(name), hessian)

    def _hessian(self, names: Sequence[str], states: list[Tensor], uses: list[int]) -> Tensor:
        """Sum of x xᵀ over the inputs that matrices share, in all uses of their block, weighted."""
        linear = self.model.get_submodule(names[0].removesuffix(".weight"))
        assert isinstance(linear, Linear)
        total = torch.zeros(linear.in_features, linear.in_features)

        seen = 0

        def note(part: nn.Module, inputs: tuple[Tensor]) -> None:
            nonlocal seen
            window, use = divmod(seen, len(uses))
            products = self.sensitivities.products
            matters = torch.stack([products[name][window][use] for name in names]).mean(0)
            self._add(inputs[0][0], total, matters)
            seen += 1
            if use + 1 == len(uses):
                raise _Enough

        handle = linear.register_forward_pre_hook(note)
        try:
            for x in states:
                with suppress(_Enough):
                    self._advanced(x, uses[0], uses[-1] + 1)
        finally:
            handle.remove()
        return total

    def _add(self, x: Tensor, hessian: Tensor, matters: Tensor) -> None:
        """Inputs (T, C) of a product, as it rounds them; `matters` (T,) is how much each counts."""
        x = x if self.scheme.activations is None else self.scheme.activations(x)
        hessian.addmm_(x.T * matters, x)

    def _advanced(self, x: Tensor, first: int, end: int) -> Tensor:
        """States (1, T, E) before step `first` brought to before step `end`."""
        config = self.model.config
        rope = rotation(torch.arange(x.shape[1]), config.head_dim, config.rope_theta, x.dtype)
        for step in range(first, end):
            x = self.model.model.layers[config.schedule[step]](x, rope, None)
        return x

    def _embedding_and_head(self) -> None:
        embedding = self.model.model.embed_tokens.weight
        width = self.model.config.hidden_size
        hessian = torch.zeros(width, width)
        for window, matters in zip(self.windows, self.sensitivities.head, strict=True):
            self._add(self.model.hidden(window[None])[0], hessian, matters)
        if self.model.lm_head is None:
            self._quantize(_EMBEDDING, embedding, hessian + self.sensitivities.embedding)
        else:
            self._quantize(_HEAD, self.model.lm_head.weight, hessian)
            self._quantize(_EMBEDDING, embedding, self.sensitivities.embedding)

    def _quantize(self, name: str, weight: Tensor, hessian: Tensor) -> None:
        kind = self.formats[name]
        if kind is None:
            return
        try:
            if not bool(torch.isfinite(hessian).all()):
                raise ValueError("its inputs on the calibration text are not finite")
            matrix = gptq(weight, hessian, kind, act_order=self.act_order)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.matrices[name] = matrix
        weight.copy_(matrix.values())
