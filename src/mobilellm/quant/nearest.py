"""Round-to-nearest: every matrix by itself, as its format defines it, without a look at any text."""

from __future__ import annotations

from collections.abc import Callable

from mobilellm.model.quantized import Matrix
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.schemes import Scheme


def round_to_nearest(
    model: MobileLLM, scheme: Scheme, progress: Callable[[int, int], None] | None = None
) -> dict[str, Matrix]:
    """Every matrix that the scheme quantises, by its checkpoint name. `progress`: matrices done, of how many.

    Raises ValueError naming a matrix that cannot be quantised.
    """
    formats = {name: kind for name, kind in scheme.formats(model.config).items() if kind is not None}
    weights = dict(model.named_parameters())
    matrices = {}
    for done, (name, kind) in enumerate(formats.items()):
        if progress is not None:
            progress(done, len(formats))
        try:
            matrices[name] = kind.quantize(weights[name].detach().float())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return matrices
