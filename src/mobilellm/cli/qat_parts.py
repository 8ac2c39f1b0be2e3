"""[qat] of a recipe: what the passes of a step run in, evaluations of the quantised model, what is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.quant.schemes import Scheme
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.qat import QatChoice

T = TypeVar("T")


def chosen_scheme(choice: QatChoice, config: ModelConfig) -> Scheme:
    """Raises ValueError for a scheme that does not exist or does not fit such a model."""
    from mobilellm.quant.schemes import check_widths, scheme

    try:
        chosen = scheme(choice.scheme, choice.embedding, choice.group)
        check_widths(chosen, config)
    except ValueError as error:
        raise ValueError(f"train: {error}") from None
    return chosen


class Qat:
    """Of one model in training. Raises ValueError for a scheme that does not exist or does not fit it."""

    def __init__(self, choice: QatChoice, model: MobileLLM) -> None:
        from mobilellm.quant.qat import QuantizedWhile

        self.scheme = chosen_scheme(choice, model.config)
        try:
            self._quantized = QuantizedWhile(model, self.scheme)
        except ValueError as error:
            raise ValueError(f"train: {error}") from None
        self._choice, self._model = choice, model

    def passes(self, done: int) -> contextlib.AbstractContextManager[None]:
        """Those of the step after `done` ones: in full precision first, if the recipe says so."""
        return contextlib.nullcontext() if done < self._choice.after_steps else self._quantized()

    def of_the_quantized(
        self, ask: Callable[[MobileLLM, int], T] | None
    ) -> Callable[[MobileLLM, int], T] | None:
        """The same question (an evaluation, samples), asked of what quantising the model then would give."""
        if ask is None:
            return None

        def asked(model: MobileLLM, step: int) -> T:
            with self._quantized():
                return ask(model, step)

        return asked

    def keep(self, out: Path, tokenizer: Tokenizer) -> None:
        """Write out/quantized, a directory as `mobilellm quantize` makes of out/model, to the bit."""
        from mobilellm.cli.quantize_parts import stored_fingerprint
        from mobilellm.quant.artefact import save
        from mobilellm.quant.quantize import quantize

        origin = stored_fingerprint(out / "model", tokenizer)
        result = quantize(self._model, self.scheme, origin=origin)
        report: dict[str, Any] = {"source": str(out / "model"), **result.to_dict(), "trained": True}
        save(out / "quantized", self._model, result.stored, tokenizer, report, True, out / "model")

    @property
    def described(self) -> str:
        """For the first line of a run."""
        first = self._choice.after_steps
        when = f" after step {first:,}" if first else ""
        kinds = f"{self.scheme.linear.name}, embedding and head {self.scheme.embedding.name}"
        return f"quantisation-aware{when}: {kinds}; evaluations are of the quantised model"
