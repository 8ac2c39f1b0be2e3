"""Quantisation-aware training: while a step is computed, the model is the one that an export would write.

What is trained, kept in checkpoints and stored at the end are ordinary weights. For the passes of a step,
and for evaluations, every matrix makes way for what round-to-nearest makes of it. That is done by `formats`,
as in `mobilellm quantize` and `export`: folding is nothing but quantising the final weights once more, and
what comes out is bit for bit what was trained. Inputs of products are rounded as the scheme rounds them.

The gradients by the rounded weights are taken for those by the ordinary ones (straight through: Bengio et al.
2013, arXiv 1308.3432), all of them. None is cut off where codes end, because scales follow the largest weight
of their group in every step: nothing is out of range but, where codes are -8 … 7, what lies opposite of the
largest weight, by less than a step. Cut off, such weights would be left where they are. Scales are not
learned: the files' formats prescribe how they follow from the weights, and others would not be exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mobilellm.model.quantized import attach, detach
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.schemes import Scheme, check_widths


class QuantizedWhile:
    """Lets a float32 model be, for a while, what quantising it now would give.

    Raises ValueError for a model that is quantised already or has adapters, and for widths that the scheme
    cannot take.
    """

    def __init__(self, model: MobileLLM, scheme: Scheme) -> None:
        if model.quantization is not None:
            raise ValueError(
                f"qat: the model is quantised already ({model.quantization.scheme}); start from what it was "
                "made from"
            )
        if not scheme.formats(model.config).keys() <= dict(model.named_parameters()).keys():
            raise ValueError(
                "qat: the model has adapters beside its matrices, and an export holds both in one; leave "
                "[lora] out, or merge it first"
            )
        check_widths(scheme, model.config)
        self._model, self._scheme = model, scheme
        self._formats = scheme.formats(model.config)
        self._values: dict[str, Tensor] = {}  # room for the rounded matrices, used again in every step

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, the parameters hold the rounded weights, and gradients of them go to the ordinary ones.

        Every matrix is rounded once, however often it is used: shared blocks, and a tied one as embedding and
        head. The weights must not be changed within. Raises ValueError naming a matrix with weights that the
        scheme cannot take.
        """
        matrices = {name: self._model.get_parameter(name) for name in self._formats}
        for name, matrix in matrices.items():
            self._round(name, matrix.detach())
        kept = {name: matrix.data for name, matrix in matrices.items()}
        try:
            for name, matrix in matrices.items():
                matrix.data = self._values[name]
            rounded = {name for name, kind in self._formats.items() if kind is not None}
            attach(self._model, self._scheme.described(0), rounded)
            yield
        finally:
            detach(self._model)
            for name, matrix in matrices.items():
                matrix.data = kept[name]

    def _round(self, name: str, weight: Tensor) -> None:
        out = self._values.get(name)
        if out is None:
            out = self._values[name] = torch.empty_like(weight)
        kind = self._formats[name]
        if kind is None:  # a matrix that stays in float16
            out.copy_(weight.half())
            return
        try:
            kind.round_into(out, weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
