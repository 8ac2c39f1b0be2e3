"""MobileLLM for Hugging Face Transformers (5.17 or later).

A Llama whose blocks may be executed more than once: the forward pass is one loop over `config.schedule`. An
entry of the schedule names the block, its number in the loop (the step) names the slot of the cache; no block
knows where it stands. Norm, MLP and rotary embedding are Transformers' own, and so are all parameter names.

This file and configuration_mobilellm.py import nothing but torch and transformers: they lie beside the
weights of every directory in `mobilellm` layout and load there with `trust_remote_code=True`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import logging

from .configuration_mobilellm import MobileLLMConfig

logger = logging.get_logger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class MobileLLMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = MobileLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MobileLLMDecoderLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 (follows from the config)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in Transformers, but a checkpoint that is not wholly this model's raises ValueError.

        Transformers itself leaves a missing tensor random and only prints a table.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if problems := [*_loading_problems(model, info, kwargs.get("ignore_mismatched_sizes", False))]:
            raise ValueError(
                f"{pretrained_model_name_or_path}: {'; '.join(problems)}; fetch or save it again"
            )
        if model.can_generate() and model.generation_config._from_model_config:
            # Read from config.json as it lies there, not as MobileLLMConfig mends it.
            generation = model.generation_config
            generation.use_cache = generation.use_cache or model.config.use_cache
            if generation.pad_token_id is None:
                generation.pad_token_id = model.config.pad_token_id
        return (model, info) if output_loading_info else model


class MobileLLMModel(MobileLLMPreTrainedModel):
    """Embedding, scheduled blocks and final norm: token ids (B, T) to hidden states (B, T, hidden_size)."""

    def __init__(self, config: MobileLLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MobileLLMDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Arguments and result as in LlamaModel.

        `hidden_states` has one entry for every step and one before, `attentions` one for every step.
        """
        config = self.config
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation = {config._attn_implementation!r} keeps no attention weights; "
                "to have them returned, load the model with attn_implementation='eager'"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
            ).unsqueeze(0)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        x = inputs_embeds  # (B, T, hidden_size)
        position_embeddings = self.rotary_emb(x, position_ids=position_ids)

        hidden_states, attentions = [], []
        for step, index in enumerate(config.schedule):
            if output_hidden_states:
                hidden_states.append(x)
            x, weights = self.layers[index](
                x,
                step=step,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)

        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if _as_dict(config, return_dict) else output.to_tuple()


class MobileLLMForCausalLM(MobileLLMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with its head; the head is the embedding unless `config.tie_word_embeddings` is false."""

    _tied_weights_keys = {HEAD: EMBEDDING}  # noqa: RUF012

    def __init__(self, config: MobileLLMConfig) -> None:
        super().__init__(config)
        self.model = MobileLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Arguments and result as in LlamaForCausalLM.

        `logits_to_keep`: compute logits for so many last positions only, or for a tensor of positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs: Any) -> None:
        """Where the config ties, the embedding is the head even if a file stores a head of its own.

        Such a file is the official 1B, whose code never reads that tensor; Transformers would use it.
        """
        if (
            self.config.tie_word_embeddings
            and missing_keys is not None
            and not missing_keys & {HEAD, EMBEDDING}
        ):
            logger.warning(f"{HEAD} is stored beside the {EMBEDDING} that it is tied to: it is left out")
            missing_keys.add(HEAD)
        super().tie_weights(missing_keys=missing_keys, **kwargs)


class MobileLLMDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MobileLLMConfig) -> None:
        super().__init__()
        self.self_attn = MobileLLMAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, hidden_size) of the next step, and this step's attention weights or None."""
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class MobileLLMAttention(nn.Module):
    """Grouped-query attention with rotary embedding, through whichever implementation the config names."""

    def __init__(self, config: MobileLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, kv_width = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,  # (B, T, hidden_size)
        step: int,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_and_time = hidden_states.shape[:-1]
        by_head = (*batch_and_time, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(by_head).transpose(1, 2)  # (B, heads, T, head_dim)
        key = self.k_proj(hidden_states).view(by_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, step)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attended.reshape(*batch_and_time, -1).contiguous()), weights


def _as_dict(config: MobileLLMConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _loading_problems(model: nn.Module, info: dict[str, Any], allow_mismatch: bool) -> Iterator[str]:
    """What keeps a loaded model from being the one that was saved, in words."""
    if info["missing_keys"]:
        yield f"missing tensors {_some(info['missing_keys'])}"
    unused = {HEAD} if not hasattr(model, "lm_head") else set()
    if unexpected := set(info["unexpected_keys"]) - unused:
        yield f"unknown tensors {_some(unexpected)}"
    if info["mismatched_keys"] and not allow_mismatch:
        yield f"tensors of another shape {_some(name for name, *_ in info['mismatched_keys'])}"
    broken = [
        name
        for name, tensor in model.named_parameters()
        if tensor.device.type != "meta" and tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        yield f"NaN or infinity in {_some(broken)}"


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


__all__ = ["MobileLLMForCausalLM", "MobileLLMModel", "MobileLLMPreTrainedModel"]
