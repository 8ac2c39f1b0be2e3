"""The table [lora] of a recipe, and what an adapter adds up to."""

from __future__ import annotations

from dataclasses import dataclass

from mobilellm.accounting import executed_parameters
from mobilellm.config import ModelConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a block."""


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """Train low-rank adapters beside frozen matrices, in place of the whole model."""

    rank: int = 16
    """Columns and rows of the two matrices of an adapter."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of its input that an adapter does not see, in training."""
    targets: tuple[str, ...] = TARGETS
    """Which matrices of every block have one."""
    dora: bool = False
    """Learn the length of every row of a matrix as well (DoRA, arXiv 2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, for large ranks (arXiv 2312.03732)."""

    def problems(self) -> list[str]:
        """What is wrong with values of the right types."""
        problems = []
        if self.rank < 1:
            problems.append(f"lora.rank = {self.rank} must be at least 1")
        if not self.alpha > 0:
            problems.append(f"lora.alpha = {self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"lora.dropout = {self.dropout} must be 0 or above, below 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            problems.append(
                f"lora.targets = {list(self.targets)} must name matrices of a block, each once: "
                f"{', '.join(TARGETS)}"
            )
        return problems


def adapter_parameters(lora: LoraChoice, config: ModelConfig) -> int:
    """Weights of the adapters, all of which are trained: one of each target of each stored block."""
    sizes = [target_shape(name, config) for name in lora.targets]
    magnitudes = sum(rows for rows, _ in sizes) if lora.dora else 0
    return config.num_layers * (lora.rank * sum(map(sum, sizes)) + magnitudes)


def flops_not_needed(lora: LoraChoice, config: ModelConfig) -> int:
    """FLOPs a token that training spares: gradients of frozen matrices, less what the adapters compute."""
    adapters = config.repeats * adapter_parameters(lora, config)
    return 2 * executed_parameters(config).matrices - 6 * adapters


def target_shape(name: str, config: ModelConfig) -> tuple[int, int]:
    """(rows, columns) of a matrix of a block."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * D, config.num_kv_heads * D
    return {
        "q_proj": (queries, E), "k_proj": (keys, E), "v_proj": (keys, E), "o_proj": (E, queries),
        "gate_proj": (F, E), "up_proj": (F, E), "down_proj": (E, F),
    }[name]  # fmt: skip
