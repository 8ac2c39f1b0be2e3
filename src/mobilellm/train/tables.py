"""The tables of a recipe beside what the loop reads: model, data, samples, logging."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from mobilellm.config import ModelConfig
from mobilellm.presets import preset

OVER_LONG = ("skip", "truncate")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The architecture: a preset, or that of `init_from`, and what differs from it.

    The vocabulary of a preset is the tokenizer's by default."""

    preset: str | None = None
    """Name of a preset (`mobilellm info` lists them); not needed with `init_from`."""
    init_from: Path | None = None
    """Start from the weights of this model (directory, run or Hub id); its shape must be this one."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    repeats: int | None = None
    order: str | None = None

    def config(self, tokenizer_vocab_size: int | None = None) -> ModelConfig:
        """The ModelConfig meant. Raises ValueError, e.g. for an unknown preset, and what reading `init_from`
        raises."""
        changes = {
            name: value
            for name in (each.name for each in fields(ModelConfig))
            if (value := getattr(self, name)) is not None
        }
        if self.preset is None:
            assert self.init_from is not None  # the recipe saw to it
            return replace(_stored_config(self.init_from), **changes)
        if tokenizer_vocab_size is not None:
            changes.setdefault("vocab_size", tokenizer_vocab_size)
        return replace(preset(self.preset), **changes)


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Text to pretrain on."""

    train: tuple[Path, ...] = ()
    """Folders of shards (`mobilellm prepare`), all of one tokenizer."""
    weights: tuple[float, ...] = ()
    """Share of each folder in the mixture; by default each as large as it is."""
    held_out: tuple[Path, ...] = ()
    """Folders whose held-out split is evaluated; by default those of `train`."""
    held_out_tokens: int = 1_000_000
    """Evaluate at most this many tokens of each, from the start."""
    document_mask: bool = False
    """No attention across documents in a packed sequence; positions restart at each, and its BOS is no
    target. Evaluations do the same."""


@dataclass(frozen=True, kw_only=True)
class ChatChoice:
    """Conversations to train on, in place of `data`. The model keeps the template."""

    train: tuple[Path, ...] = ()
    """Files of conversations: JSON, JSON lines (plain or packed) or parquet."""
    held_out: tuple[Path, ...] = ()
    """Files that are evaluated and not trained on; by default a part of those of `train`."""
    held_out_fraction: float = 0.05
    """That part, chosen by the hash of each conversation: at least one, unless this is 0."""
    held_out_tokens: int = 1_000_000
    """Evaluate on at most this many tokens."""
    template: Path | None = None
    """A Jinja chat template; by default the model's own, or ours where it has none."""
    assistant_only: bool = True
    """Learn what the assistant says and to stop after it; else every token."""
    packing: bool = True
    """Put several conversations into one sequence, where none sees another; else each has one to itself."""
    over_long: str = "skip"
    """Of conversations longer than a sequence: skip (counted) or truncate (the end is lost)."""


@dataclass(frozen=True, kw_only=True)
class SampleChoice:
    prompts: tuple[str, ...] = ()
    """Texts completed (of conversations: answered) at every evaluation, to see what the model says."""
    tokens: int = 40
    """New tokens for each."""
    temperature: float = 0.7


@dataclass(frozen=True, kw_only=True)
class LogChoice:
    tensorboard: bool = True
    """Write RUN/tensorboard beside RUN/metrics.jsonl."""
    tracker: str = "none"
    """Also to trackio or wandb (must be installed), or none."""
    project: str = "mobilellm"
    """Project name there."""


def _stored_config(source: Path) -> ModelConfig:
    from mobilellm import hub
    from mobilellm.model_directory import read_config_file

    return read_config_file(hub.resolve(source, lambda notice: None)).config
