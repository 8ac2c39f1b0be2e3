"""What a distillation does before its first step, and what that takes: a teacher runs over a text, once.

Counted, not measured, as in `memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mobilellm.accounting import attention_flops_per_token, executed_parameters, stored_parameters
from mobilellm.config import ModelConfig

CHUNK_LOGITS = 2**22
"""Logits of a teacher that are held at a time."""
TOKENS_AT_ONCE = {"cpu": 2048}
TOKENS_AT_ONCE_ELSEWHERE = 16384
"""Of a batch of passages, at most; of a single passage it may be more."""
_LOGITS_BYTES = 16
"""Of a logit: as it is made, divided by the temperature, and twice while exponentials are summed."""


class Lack(NamedTuple):
    """Of the passages of a run, those that a cache has not."""

    passages: int
    tokens: int
    places: int
    """After which the teacher is asked what comes next."""
    pairs: int
    """Of a token and one that it sees, itself included."""
    longest: int
    """Tokens of the longest passage."""


@dataclass(frozen=True)
class TeacherShape:
    """What is known of a teacher before it is loaded."""

    name: str
    vocab_size: int
    """Of its tokenizer."""
    context: int
    parameters: int
    in_blocks: int
    """Weights that act on a token, without the head's."""
    in_head: int
    flops_per_pair: int
    """Of a token's attention to one other."""
    weights_bytes: int
    """As it runs: the weights, and what is laid out anew beside them."""
    widths: tuple[int, int]
    """hidden_size, intermediate_size."""
    runs_beside: bool = False
    """On the machine's processor whatever the student trains on."""

    def flops(self, lack: Lack) -> float:
        """Of running over what is lacking; padding is not counted."""
        products = 2.0 * self.in_blocks * lack.tokens + 2.0 * self.in_head * lack.places
        return products + float(self.flops_per_pair) * lack.pairs

    def memory_bytes(self, longest: int, width: int, on_gpu: bool) -> int:
        """On the student's device while the teacher runs, with `width` bytes a number."""
        if self.runs_beside and on_gpu:
            return 0
        hidden, inner = self.widths
        tokens = max(longest, TOKENS_AT_ONCE_ELSEWHERE if on_gpu else TOKENS_AT_ONCE["cpu"])
        activations = tokens * (4 * hidden + width * (5 * hidden + 3 * inner))
        return self.weights_bytes + activations + _LOGITS_BYTES * max(CHUNK_LOGITS, self.vocab_size)


@dataclass(frozen=True)
class Teaching:
    """Before the first step."""

    teacher: str | None
    """None: the cache holds everything, and no teacher is named."""
    parameters: int | None
    passages: int
    """That the teacher runs over, all devices together."""
    tokens: int
    at_most: bool
    """Whether the data are not there yet: then this is all of the run, as if nothing came twice."""
    flops: float
    memory_bytes: int
    """On a device, beside the student's weights."""
    cache: str
    cache_passages: int
    """That are there already."""
    cache_bytes_added: int


def shape_of(
    name: str, config: ModelConfig, vocab_size: int, weights_bytes: int, runs_beside: bool = False
) -> TeacherShape:
    """Of a model that this package knows."""
    executed, stored = executed_parameters(config), stored_parameters(config)
    return TeacherShape(
        name=name,
        vocab_size=vocab_size,
        context=config.max_position_embeddings,
        parameters=stored.total,
        in_blocks=executed.attention + executed.ffn,
        in_head=executed.head,
        flops_per_pair=attention_flops_per_token(config, 1),
        weights_bytes=weights_bytes,
        widths=(config.hidden_size, config.intermediate_size),
        runs_beside=runs_beside,
    )


def inference_bytes(config: ModelConfig, width: int) -> int:
    """Weights of a model of ours of `width` bytes each, and q, k, v and gate, up once more, joined."""
    stored, E = stored_parameters(config), config.hidden_size
    joined = E * (
        (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 2 * config.intermediate_size
    )
    return width * (stored.total + config.num_layers * joined)


def all_of(steps: int, sequences: int, length: int) -> Lack:
    """As if every sequence of a run were a passage of its own, counted everywhere."""
    passages = steps * sequences
    tokens = passages * length
    return Lack(passages, tokens, tokens, tokens * (length + 1) // 2, length)
