"""ModelConfig: the architecture of one model, frozen and strict, and the layer schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

ORDERS = ("immediate", "all-over", "reverse")
"""Orders in which shared blocks are executed (MobileLLM, Table 2), for blocks A B C run twice:
immediate AABBCC, all-over ABCABC, reverse ABCCBA."""


class ConfigError(ValueError):
    """A configuration that cannot be right; the message lists everything wrong with it on one line."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that shapes a model. Shape fields have no default; the rest default to the published values.

    Raises ConfigError (a ValueError) that names every bad field at once.
    """

    vocab_size: int
    """Rows of the embedding; the tokenizer may use fewer."""
    hidden_size: int
    """Width of a token's state between blocks."""
    intermediate_size: int
    """Inner width of the feed-forward network."""
    num_layers: int
    """*Stored* blocks; each is executed `repeats` times in the given `order`: see `schedule`."""
    num_heads: int
    """Query heads, a multiple of `num_kv_heads` (grouped-query attention)."""
    num_kv_heads: int
    head_dim: int
    """Numbers of a head, even; num_heads × head_dim need not be `hidden_size`."""
    max_position_embeddings: int
    """The context: most tokens of a text, prompt and answer together."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths (Su et al. 2021)."""
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    tie_word_embeddings: bool = True
    """The head is the embedding: one matrix, stored once."""
    repeats: int = 1
    order: str = "immediate"
    """One of ORDERS."""

    def __post_init__(self) -> None:
        problems = _type_problems(self)
        problems |= {name: text for name, text in _value_problems(self).items() if name not in problems}
        if problems:
            raise ConfigError("model config: " + "; ".join(problems.values()))

    @property
    def schedule(self) -> tuple[int, ...]:
        """Block index of every executed step.

        >>> from mobilellm.presets import preset
        >>> replace(preset("test"), num_layers=3, repeats=2, order="reverse").schedule
        (0, 1, 2, 2, 1, 0)
        """
        stored = range(self.num_layers)
        if self.order == "immediate":
            return tuple(block for block in stored for _ in range(self.repeats))
        if self.order == "all-over":
            return tuple(stored) * self.repeats
        there_and_back = (tuple(stored), tuple(reversed(stored)))
        return tuple(block for turn in range(self.repeats) for block in there_and_back[turn % 2])

    @property
    def num_steps(self) -> int:
        """Executed blocks per token; the KV cache has one slot for each."""
        return self.num_layers * self.repeats

    @property
    def shares_layers(self) -> bool:
        return self.repeats > 1

    def unrolled(self) -> ModelConfig:
        """The same computation with every executed step stored as a block of its own."""
        return replace(self, num_layers=self.num_steps, repeats=1, order="immediate")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "model config") -> ModelConfig:
        """Build from a mapping; unknown and missing keys are all listed in one ConfigError."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        unknown = sorted(set(values) - known)
        missing = sorted(required - set(values))
        if unknown or missing:
            parts = [f"unknown keys {unknown}"] if unknown else []
            parts += [f"missing keys {missing}"] if missing else []
            raise ConfigError(f"{source}: {' and '.join(parts)}; known keys are {sorted(known)}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {str(error).removeprefix('model config: ')}") from None

    def to_json(self) -> str:
        """Canonical text: `ModelConfig.from_json(text).to_json() == text`, byte for byte."""
        import json

        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "model config") -> ModelConfig:
        import json

        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values, source)


def _type_problems(config: ModelConfig) -> dict[str, str]:
    """What is wrong, by field. Whole numbers are accepted for floats, and stored as floats."""
    problems = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "float" and type(value) is int and abs(value) < 2**53:
            object.__setattr__(config, field.name, float(value))
        elif type(value).__name__ != field.type:
            problems[field.name] = f"{field.name} = {value!r} must be of type {field.type}"
    return problems


def _value_problems(config: ModelConfig) -> dict[str, str]:
    """What is wrong, by field. A field of the wrong type is skipped where it cannot be compared."""
    problems = {}
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
        "num_kv_heads", "head_dim", "max_position_embeddings", "repeats",
    ):  # fmt: skip
        value = getattr(config, name)
        if type(value) is int and value < 1:
            problems[name] = f"{name} = {value} must be at least 1"
    for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
        value = getattr(config, name)
        if type(value) is float and not 0 < value < math.inf:
            problems[name] = f"{name} = {value} must be positive and finite"
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    if type(head_dim) is int and head_dim % 2:
        problems.setdefault("head_dim", f"head_dim = {head_dim} must be even (rotary embedding turns pairs)")
    if type(heads) is int and type(kv_heads) is int and kv_heads >= 1 and heads % kv_heads:
        text = f"num_heads = {heads} must be a multiple of num_kv_heads = {kv_heads}"
        problems.setdefault("num_heads", text)
    if config.order not in ORDERS:
        problems["order"] = f"order = {config.order!r} must be one of {', '.join(ORDERS)}"
    elif config.repeats == 1 and config.order != "immediate":
        problems["order"] = f"order = {config.order!r} has no effect with repeats = 1; leave it out"
    return problems
