"""What a run does, apart from the model and the data. Every field is read by the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

_POSITIVE = (
    "steps", "sequence_length", "sequences_per_step", "micro_batch", "learning_rate", "epsilon", "clip_norm",
    "evaluate_every", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Defaults are the paper's values (MobileLLM, section 4.1, and the reference code) where it gives them.

    Batch size is given in sequences per step, whatever the number of devices; gradients are accumulated
    over micro-batches of `micro_batch` sequences. Raises ValueError naming every bad field at once.
    """

    steps: int
    sequence_length: int
    sequences_per_step: int
    micro_batch: int
    optimizer: str = "adamw"
    """"adamw" as published, or "muon": Muon for the blocks' matrices, AdamW for the rest."""
    learning_rate: float = 2e-3
    warmup_steps: int = 1000
    final_fraction: float = 0.1
    """The cosine schedule ends at this fraction of the peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "bfloat16"
    """"bfloat16" runs matrix products in bfloat16 (autocast), weights and optimiser stay float32."""
    seed: int = 0
    """Of torch's random numbers, for losses and models that draw any; callers give it to the loader too."""
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        problems = _type_problems(self) or _value_problems(self)
        if problems:
            raise ValueError("train: " + "; ".join(problems))

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length


def _type_problems(settings: TrainSettings) -> list[str]:
    """Whole numbers are accepted for floats, and stored as floats."""
    problems = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type == "float" and type(value) is int and abs(value) < 2**53:
            object.__setattr__(settings, field.name, float(value))
        elif type(value).__name__ != field.type or (type(value) is float and not math.isfinite(value)):
            kind = "finite float" if field.type == "float" else field.type
            problems.append(f"{field.name} = {value!r} must be of type {kind}")
    return problems


def _value_problems(settings: TrainSettings) -> list[str]:
    problems = []
    for names, good, words in (
        (_POSITIVE, lambda value: value > 0, "above 0"),
        (("warmup_steps", "weight_decay"), lambda value: value >= 0, "0 or above"),
        (("seed",), lambda value: 0 <= value < 2**63, "0 or above, below 2^63"),
        (("final_fraction",), lambda value: 0 <= value <= 1, "in 0 … 1"),
        (("beta1", "beta2"), lambda value: 0 <= value < 1, "0 or above, below 1"),
        (("optimizer",), lambda value: value in ("adamw", "muon"), "adamw or muon"),
        (("precision",), lambda value: value in ("bfloat16", "float32"), "bfloat16 or float32"),
    ):
        found = ((name, getattr(settings, name)) for name in names)
        problems += [f"{name} = {value} must be {words}" for name, value in found if not good(value)]
    if settings.micro_batch > 0 and settings.sequences_per_step % settings.micro_batch:
        problems.append(
            f"sequences_per_step = {settings.sequences_per_step} must be a multiple of "
            f"micro_batch = {settings.micro_batch}"
        )
    return problems
