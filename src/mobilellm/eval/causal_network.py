"""A causal language model of transformers as two functions: ids to states, and states to logits.

The head over a whole vocabulary is half of a small model's work, and evaluations need it at few places. So
where it can be had apart from the rest, only the states of those places go through it. Whether that gives
the model's own logits (some scale or cap them afterwards) is tried out on each model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CausalNetwork:
    """`states` of ids (B, T) are (B, T, width); `logits` of states (N, width) are float32 (N, vocabulary).

    No attention mask is passed: rows are padded on the right, where a causal model does not look, and without
    a mask every architecture counts positions from the row's first token. Raises ValueError for a model that
    does look ahead.
    """

    def __init__(self, model: Any, source: str, rows: int) -> None:
        self._model = model
        first, second, other = rows // 2, rows // 2 + 1, rows // 3
        ids = torch.tensor([[first, second], [first, other]], device=model.device)
        whole = self._all_logits(ids)
        _refuse_looking_ahead(whole, model.dtype, source)
        self.vocabulary: int = whole.shape[-1]
        self.splits: bool = self._is_split_right(ids, whole)
        """Whether `states` are hidden states; else they are the logits of every place already."""

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        return self._hidden(ids) if self.splits else self._all_logits(ids)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        return self._head()(states).float() if self.splits else states.float()

    def _hidden(self, ids: Tensor) -> Tensor:
        states: Tensor = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _head(self) -> Callable[[Tensor], Tensor]:
        head: Callable[[Tensor], Tensor] = self._model.get_output_embeddings()
        return head

    @torch.no_grad()
    def _all_logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _is_split_right(self, ids: Tensor, whole: Tensor) -> bool:
        try:
            split = self._head()(self._hidden(ids))
        except Exception:  # code of any model: without a base model, a head, this output, ...
            return False
        return split.shape == whole.shape and torch.equal(split.to(whole.dtype), whole)


def _refuse_looking_ahead(logits: Tensor, dtype: torch.dtype, source: str) -> None:
    """Two rows that differ in their second token must agree at their first."""
    first, same = logits[0, 0].float(), logits[1, 0].float()
    allowed = torch.finfo(dtype).eps ** 0.5 * first.abs().max()
    if (first - same).abs().max() > allowed:
        raise ValueError(
            f"{source}: the model looks at what comes after a token, so it gives no likelihood of a text; "
            "use a causal language model"
        )
