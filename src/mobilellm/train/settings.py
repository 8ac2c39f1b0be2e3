"""What a run does, apart from the model and the data: the sections of a recipe. Every field is read.

Defaults are the paper's values (MobileLLM, section 4.1, and the reference code) where it gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

SCHEDULES = ("cosine", "wsd", "linear")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("bfloat16", "float32")
STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How much text one optimiser step sees, whatever the number of devices."""

    tokens_per_step: int
    """Tokens of one step over all devices together; gradients are accumulated to reach it."""
    sequence_length: int
    """Tokens of one sequence; must divide tokens_per_step and fit the model's context."""
    micro_batch: int
    """Most sequences a device holds at once. Memory and speed depend on it, results to rounding only."""

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_length

    def check(self, context: int, devices: int) -> None:
        """Raise ValueError unless a model of that context takes the sequences, and the devices share them."""
        if self.sequence_length > context:
            raise ValueError(
                f"train: batch.sequence_length = {self.sequence_length} is longer than the model's context "
                f"of {context} (max_position_embeddings); make it {context} or less"
            )
        if self.sequences_per_step % devices:
            more = -(-self.sequences_per_step // devices) * devices * self.sequence_length
            raise ValueError(
                f"train: batch.tokens_per_step = {self.tokens_per_step} makes {self.sequences_per_step} "
                f"sequences, which {devices} devices cannot share evenly; batch.tokens_per_step = {more} "
                "would do"
            )


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    name: str = "adamw"
    """adamw as published; muon: Muon for the blocks' matrices, AdamW for embedding, head and norms."""
    lr: float = 2e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices, the embedding's too; norms never decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    name: str = "cosine"
    """cosine (published), wsd (warm up, stay, decay linearly), linear."""
    warmup_steps: int = 1000
    final_fraction: float = 0.1
    """The learning rate ends at this fraction of its peak."""
    decay_fraction: float = 0.2
    """wsd: the last part of the run in which the learning rate decays."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    precision: str = "bfloat16"
    """bfloat16 runs matrix products in bfloat16; weights, optimiser and sums stay float32."""
    compile: bool = False
    """torch.compile the blocks: slower to start, faster on a GPU."""
    activation_checkpointing: bool = False
    """Keep one tensor a block and compute the rest again in the backward pass: less memory, 1/3 more work."""
    z_loss: float = 0.0
    """Weight of the squared log-partition (PaLM, section 5), which keeps logits from drifting. The loss of a
    step includes it; evaluations do not."""
    strategy: str = "ddp"
    """Of several devices: ddp (a copy of the model each) or fsdp (fully_shard: each holds a part)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """How many of the newest are kept."""
    milestone_every: int = 0
    """Checkpoints of steps divisible by this are kept for ever; 0: none."""
    asynchronous: bool = False
    """Write in the background, from a copy of the state in memory."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """When to stop a run that goes wrong. A loss that is not finite always stops it."""

    spike_factor: float = 0.0
    """Stop when the loss exceeds the median of the last `window` steps this many times; 0: never."""
    window: int = 100


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All that `train.loop.train` reads. Raises ValueError naming every bad field at once."""

    steps: int
    """Optimiser steps of the whole run."""
    seed: int = 0
    """Of the weights, the order of the data, and whatever a loss draws."""
    batch: BatchSettings
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    evaluate_every: int = 1000
    """Steps between evaluations; there is one before the first step and one after the last."""

    def __post_init__(self) -> None:
        if problems := type_problems(self) or self._problems():
            raise ValueError("train: " + "; ".join(problems))

    @property
    def total_tokens(self) -> int:
        return self.steps * self.batch.tokens_per_step

    def _problems(self) -> list[str]:
        """What is wrong with values of the right types."""
        problems = [text for name, good, text in self._rules() if not good(_value(self, name))]
        return problems or self._relations()

    def _rules(self) -> Iterator[tuple[str, Callable[[Any], bool], str]]:
        for name, good, words in _RULES:
            yield name, good, f"{name} = {_value(self, name)!r} must be {words}"

    def _relations(self) -> list[str]:
        batch = self.batch
        if self.optim.name == "muon" and self.compute.strategy == "fsdp":
            return [
                "optim.name = 'muon' needs whole matrices, which compute.strategy = 'fsdp' splits; use 'ddp' "
                "or 'adamw'"
            ]
        if batch.tokens_per_step % batch.sequence_length:
            nearest = max(1, round(batch.tokens_per_step / batch.sequence_length)) * batch.sequence_length
            return [
                f"batch.tokens_per_step = {batch.tokens_per_step} must be a multiple of "
                f"batch.sequence_length = {batch.sequence_length}, as {nearest} is"
            ]
        return []


def _above(bound: float) -> Callable[[Any], bool]:
    return lambda value: value > bound


def _within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high


def _one_of(names: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: value in names


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *(
        (name, _above(0), "above 0")
        for name in (
            "steps", "evaluate_every", "batch.tokens_per_step", "batch.sequence_length", "batch.micro_batch",
            "optim.lr", "optim.epsilon", "optim.clip_norm", "checkpoint.every", "checkpoint.keep_last",
            "guard.window",
        )
    ),
    *(
        (name, _within(0, math.inf), "0 or above")
        for name in (
            "schedule.warmup_steps", "optim.weight_decay", "compute.z_loss", "checkpoint.milestone_every",
        )
    ),
    ("seed", lambda value: 0 <= value < 2**63, "0 or above, below 2^63"),
    ("schedule.final_fraction", _within(0, 1), "in 0 … 1"),
    ("schedule.decay_fraction", lambda value: 0 < value <= 1, "above 0, at most 1"),
    ("optim.beta1", lambda value: 0 <= value < 1, "0 or above, below 1"),
    ("optim.beta2", lambda value: 0 <= value < 1, "0 or above, below 1"),
    ("guard.spike_factor", lambda value: value == 0 or value > 1, "0 or above 1"),
    ("optim.name", _one_of(OPTIMIZERS), " or ".join(OPTIMIZERS)),
    ("schedule.name", _one_of(SCHEDULES), "one of " + ", ".join(SCHEDULES)),
    ("compute.precision", _one_of(PRECISIONS), " or ".join(PRECISIONS)),
    ("compute.strategy", _one_of(STRATEGIES), " or ".join(STRATEGIES)),
)  # fmt: skip


def type_problems(settings: Any, prefix: str = "") -> list[str]:
    """Fields of nested frozen dataclasses whose values are of another type, floats finite.

    Whole numbers are accepted for floats, and stored as floats.
    """
    problems = []
    for name, kind in get_type_hints(type(settings)).items():
        if name not in {field.name for field in fields(settings)}:
            continue
        value = getattr(settings, name)
        table = next((each for each in (kind, *get_args(kind)) if is_dataclass(each)), None)
        if table is not None and not (value is None and kind is not table):
            if type(value) is table:
                problems += type_problems(value, f"{prefix}{name}.")
            else:
                problems.append(f"{prefix}{name} = {value!r} must be a table")
        elif kind is float and type(value) is int and abs(value) < 2**53:
            object.__setattr__(settings, name, float(value))
        elif kind in (int, float, bool, str) and (
            type(value) is not kind or (kind is float and not math.isfinite(value))
        ):
            words = "finite float" if kind is float else kind.__name__
            problems.append(f"{prefix}{name} = {value!r} must be of type {words}")
    return problems


def _value(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings
