"""What a run does, apart from the model and the data. Every field is read by the loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Defaults are the paper's values (MobileLLM, section 4.1, and the reference code) where it gives them.

    Batch size is given in sequences per step, whatever the number of devices; gradients are accumulated
    over micro-batches of `micro_batch` sequences. Raises ValueError naming the field.
    """

    steps: int
    sequence_length: int
    sequences_per_step: int
    micro_batch: int
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
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        positive = (
            "steps", "sequence_length", "sequences_per_step", "micro_batch", "learning_rate", "epsilon",
            "clip_norm", "evaluate_every", "checkpoint_every", "keep_checkpoints",
        )  # fmt: skip
        problems = [
            f"{name} = {getattr(self, name)} must be above 0"
            for name in positive
            if not getattr(self, name) > 0
        ]
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps = {self.warmup_steps} must be 0 or above")
        if not 0 <= self.final_fraction <= 1:
            problems.append(f"final_fraction = {self.final_fraction} must lie in 0 … 1")
        if self.precision not in ("bfloat16", "float32"):
            problems.append(f"precision = {self.precision!r} must be bfloat16 or float32")
        if self.micro_batch > 0 and self.sequences_per_step % self.micro_batch:
            problems.append(
                f"sequences_per_step = {self.sequences_per_step} must be a multiple of "
                f"micro_batch = {self.micro_batch}"
            )
        if problems:
            raise ValueError("train: " + "; ".join(problems))

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length
