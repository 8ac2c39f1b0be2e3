"""A model and a scheme in, the quantised model and what is known about it out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mobilellm.model.quantized import Origin, Quantized
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.artefact import assemble, quantized_model
from mobilellm.quant.calibrated import calibrated
from mobilellm.quant.compare import Comparison, Judge
from mobilellm.quant.nearest import round_to_nearest
from mobilellm.quant.schemes import Scheme, check_widths

Progress = Callable[[str, int, int], None]
"""(what is done, how much of it, of how much)"""


@dataclass(frozen=True)
class Calibration:
    """What GPTQ is given."""

    windows: tuple[Tensor, ...]
    """Token ids (T,)."""
    act_order: bool = True
    """Columns with the largest inputs first."""


class Result(NamedTuple):
    stored: Quantized
    scheme: Scheme
    method: str
    """rtn or gptq"""
    seconds: float
    """To quantise, the comparison not counted."""
    wider: dict[str, str]
    """Matrices in a wider format than their role's, and why."""
    weights: int
    comparison: Comparison | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored.quantization.bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        kind = self.stored.quantization
        return {
            **kind.to_dict(),
            "method": self.method,
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "wider": self.wider,
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }


def quantize(
    source: MobileLLM,
    scheme: Scheme,
    calibration: Calibration | None = None,
    judge: Judge | None = None,
    progress: Progress = lambda what, done, total: None,
    origin: str | None = None,
) -> Result:
    """Quantise a float32 model, and compare it with its source where there is a judge.

    By GPTQ with a calibration, else by round-to-nearest. `origin` is the source's `fingerprint`, which the
    result is to carry.

    Raises ValueError for widths and weights that the scheme cannot take.
    """
    check_widths(scheme, source.config)
    began = time.perf_counter()
    if calibration is None:
        matrices = round_to_nearest(source, scheme, lambda done, total: progress("matrices", done, total))
    else:
        matrices = calibrated(source, scheme, calibration.windows, calibration.act_order, progress)
    method = "rtn" if calibration is None else "gptq"
    stored = assemble(source, scheme, matrices)
    if origin is not None:
        stored = stored._replace(origin=Origin(origin, method))
    seconds = time.perf_counter() - began
    comparison = None
    if judge is not None:
        made = quantized_model(source, stored)
        comparison = judge(made, lambda done, total: progress("tokens compared", done, total))
    size = scheme.size(source.config)
    return Result(stored, scheme, method, seconds, scheme.wider(source.config), size.weights, comparison)
