"""The configuration of MobileLLM models for Hugging Face Transformers (5.17 or later).

This file and modeling_mobilellm.py import nothing but torch and transformers: they lie beside the weights of
every directory in `mobilellm` layout and load there with `trust_remote_code=True`.
"""

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

ORDERS = ("immediate", "all-over", "reverse")


class MobileLLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """A Llama without biases whose head may be the embedding and whose blocks may be executed repeatedly.

    `num_hidden_layers` counts the *stored* blocks. With `layer_sharing` each is executed
    `layer_sharing_repeats` times (2 where a file does not say, as in the official ones) in
    `layer_sharing_order`: see `schedule`. `share_embedding` is another name of `tie_word_embeddings` and wins
    where a file says both. Raises ValueError that names every field that is wrong or not implemented.
    """

    model_type = "mobilellm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (an annotation would make it a field)
    attribute_map = {"share_embedding": "tie_word_embeddings"}  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: Any = 3  # int; None: one for every head
    head_dim: Any = None  # int; None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    rope_parameters: Any = None  # dict; made of the rope_theta that config files write
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pretraining_tp: int | None = 1
    layer_sharing: bool = False
    layer_sharing_repeats: Any = None  # int; None: 2 with layer_sharing, else 1
    layer_sharing_order: str = "immediate"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and isinstance(self.hidden_size, int) and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_sharing_repeats is None:
            self.layer_sharing_repeats = 2 if self.layer_sharing else 1
            if self.layer_sharing:
                # A file that does not count the repeats is an official one. Those switch the cache off, for
                # their code put both executions of a block into one slot of it; here each has its own.
                self.use_cache = True
        layer_types = kwargs.pop("layer_types", None)  # checked below; no cache must be sized by it
        super().__post_init__(**kwargs)
        if problems := [*self._wrong_values(), *self._not_implemented(layer_types)]:
            raise ValueError("MobileLLMConfig: " + "; ".join(problems))

    @property
    def num_steps(self) -> int:
        """Executed blocks per token. Every cache has one slot for each."""
        return self.num_hidden_layers * int(self.layer_sharing_repeats)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Block index of every step: blocks A B C twice are AABBCC, all-over ABCABC, or reverse ABCCBA."""
        blocks, repeats = range(self.num_hidden_layers), int(self.layer_sharing_repeats)
        if self.layer_sharing_order == "all-over":
            return tuple(blocks) * repeats
        if self.layer_sharing_order == "reverse":
            return tuple(i for turn in range(repeats) for i in (blocks if turn % 2 == 0 else blocks[::-1]))
        return tuple(i for i in blocks for _ in range(repeats))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "MobileLLMConfig":
        """With `decoder=True`, the config of the same computation with every step stored as its own block.

        Transformers calls it so wherever it makes a cache, and gives that `num_hidden_layers` slots.
        """
        if not decoder or encoder or self.num_steps == self.num_hidden_layers:
            return self
        unrolled = copy.copy(self)
        unrolled.num_hidden_layers = self.num_steps
        unrolled.layer_sharing, unrolled.layer_sharing_repeats = False, 1
        unrolled.layer_sharing_order = "immediate"
        return unrolled

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "share_embedding": self.tie_word_embeddings}

    def _wrong_values(self) -> Iterator[str]:
        counts = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "layer_sharing_repeats",
        )  # fmt: skip
        wrong = [name for name in counts if type(getattr(self, name)) is not int or getattr(self, name) < 1]
        for name in wrong:
            yield f"{name} = {getattr(self, name)!r} must be a whole number, at least 1"
        for name in ("rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                yield f"{name} = {getattr(self, name)} must be positive"
        if wrong:
            return
        if self.head_dim % 2:
            yield f"head_dim = {self.head_dim} must be even (rotary embedding turns pairs)"
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.layer_sharing_order not in ORDERS:
            yield f"layer_sharing_order = {self.layer_sharing_order!r} must be one of {', '.join(ORDERS)}"
        elif self.layer_sharing_repeats == 1 and self.layer_sharing_order != "immediate":
            yield f"layer_sharing_order = {self.layer_sharing_order!r} has no effect without repeats"
        if not self.layer_sharing and self.layer_sharing_repeats > 1:
            yield f"layer_sharing_repeats = {self.layer_sharing_repeats} needs layer_sharing = true"

    def _not_implemented(self, layer_types: list[str] | None) -> Iterator[str]:
        allowed = {
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "attention_dropout": (0, None),
            "pretraining_tp": (1, None),
            "sliding_window": (None,),
        }
        for name, values in allowed.items():
            value = getattr(self, name, values[0])
            if value not in values:
                yield f"{name} = {value!r} is not implemented (only {values[0]!r} is)"
        rope = {"rope_type": "default", **self.rope_parameters}
        if rope["rope_type"] != "default" or set(rope) != {"rope_type", "rope_theta"}:
            yield f"rope_parameters = {rope} are not implemented (only 'default' is)"
        if set(layer_types or ()) - {"full_attention"}:
            yield "layer_types other than 'full_attention' are not implemented"
