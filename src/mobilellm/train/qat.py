"""The table [qat] of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QatChoice:
    """Compute steps with the weights that quantising would give then (`quant/qat.py`)."""

    scheme: str = "q4_0"
    """q8_0, q4_0, 8da4w, int8 or w8a8, as in `mobilellm quantize`."""
    embedding: str | None = None
    """Format of embedding and head where it is not the scheme's own: q4_0 can have q8_0, 8da4w int4."""
    group: int | None = None
    """8da4w: weights that share a scale; by default 32."""
    after_steps: int = 0
    """Steps in full precision before it begins. Evaluations are of the quantised model from the start."""

    def problems(self, steps: int, strategy: str) -> list[str]:
        """What is wrong with values of the right types, in a run of so many steps (0: not known yet)."""
        problems = []
        if self.after_steps < 0 or 0 < steps <= self.after_steps:
            problems.append(
                f"qat.after_steps = {self.after_steps} must be 0 or above, and below steps = {steps}"
            )
        if strategy == "fsdp":
            problems.append("qat needs whole matrices, which compute.strategy = 'fsdp' splits; use 'ddp'")
        return problems
