"""[distill] of a recipe: which teacher, and how much it counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class DistillChoice:
    """Learn a teacher's probabilities beside the text: ce_weight * nll + kl_weight * T² * KL."""

    teacher: str | None = None
    """A model with the same tokenizer: directory, run, Hub id or .gguf file. Before the first step it runs
    over every row of the run that the cache lacks; where none is missing it can be left out."""
    cache: Path = Path("teacher-cache")
    """Folder that keeps what it said, for later epochs and runs."""
    top_k: int = 64
    """How many of its likeliest tokens are kept at every place; all others count as one."""
    temperature: float = 1.0
    """T, by which the logits of both are divided."""
    ce_weight: float = 0.5
    """Of the cross-entropy with the text."""
    kl_weight: float = 0.5
    """Of the divergence of the student from the teacher."""
    dtype: str | None = None
    """In which the teacher computes, float32 (by default) or bfloat16; a .gguf file as it is stored."""

    def problems(self) -> Iterator[str]:
        """What is wrong with values of the right types."""
        if self.top_k < 1:
            yield f"distill.top_k = {self.top_k} must be above 0"
        if not self.temperature > 0:
            yield f"distill.temperature = {self.temperature} must be above 0"
        if not self.kl_weight > 0:
            yield f"distill.kl_weight = {self.kl_weight} must be above 0; without it leave [distill] out"
        if not self.ce_weight >= 0:
            yield f"distill.ce_weight = {self.ce_weight} must be 0 or above"
        if self.dtype is not None and self.dtype not in DTYPES:
            yield f"distill.dtype = {self.dtype!r} must be {' or '.join(DTYPES)}"
