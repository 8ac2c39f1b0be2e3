"""The forward pass to train with; on a CPU in bfloat16 a faster way through the blocks.

The faster way computes what the modules of transformer.py compute, with the same weights. Matrix products are
those of products.py; all that lies between them is done by cpu_kernels.c in one pass over memory each, and
little is kept for backward (training_steps.py). The residual stream and the norms' sums are float32, and so
are gradients of weights unless their `grad_dtype` says bfloat16.
N = B * T tokens; other letters as in transformer.py, and G = H / K query heads to a key/value head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model import cpu_kernels
from mobilellm.model.adapted import adapted_linear, has_hooks
from mobilellm.model.cpu_kernels import LONGEST, Kernels
from mobilellm.model.document_mask import document_starts, segmented_view
from mobilellm.model.products import products
from mobilellm.model.projection import Projection
from mobilellm.model.rope import angles
from mobilellm.model.training_steps import Attention, EmbeddingAndHead, FeedForward, Norm, Setting
from mobilellm.model.transformer import Block, Linear, MobileLLM, products_dtype


def training_hidden(
    model: MobileLLM,
    tokens: Tensor,
    segments: Tensor | None = None,
    activation_checkpointing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Final hidden states (B, T, E) as the head takes them, and its weight (V, E), for a loss.

    Those of `MobileLLM.hidden`, rounded where the model rounds what goes into its head.
    `segments` (B, T) numbers the documents of every row in order: no token attends outside its own, and
    positions begin at 0 in each. They may lie on the CPU whatever the device of the tokens. With
    `activation_checkpointing` blocks keep their inputs only and run again in backward. Where the faster way
    is taken the hidden states are bfloat16, and the gradient of the head's weight is changed in place: it
    must come from nothing but one function that made it.
    """
    kernels = None if why_plain(model) else cpu_kernels.load()
    if not isinstance(kernels, Kernels) or tokens.shape[1] > LONGEST:
        view: dict[str, Any] = {}
        if segments is not None:  # made out here: fully_shard would send the segments to the GPU first
            dtype = products_dtype(model.head_weight)
            positions, mask = segmented_view(segments, tokens.device, dtype)
            view = {"positions": positions, "mask": mask}
        hidden = model.hidden(tokens, activation_checkpointing=activation_checkpointing, **view)
        rounding = model.head_rounding
        return hidden if rounding is None else rounding(hidden), model.head_weight
    runner = Runner(kernels, model, tokens, segments)
    hidden = model.hidden(tokens, activation_checkpointing=activation_checkpointing, runner=runner)
    return hidden, model.head_weight if runner.head is None else runner.head


def why_plain(model: MobileLLM) -> str | None:
    """Why training would run the plain modules here and now; None where the faster way is open."""
    if model.head_weight.device.type != "cpu":
        return f"the device is {model.head_weight.device.type}"
    if not torch.is_grad_enabled():
        return "no gradients are wanted"
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "products are not in bfloat16"
    if torch.compiler.is_compiling() or blocks_are_compiled(model):
        return "the blocks are compiled"
    found = cpu_kernels.load()
    return found if isinstance(found, str) else None


def blocks_are_compiled(model: MobileLLM) -> bool:
    return any(block._compiled_call_impl for block in model.model.layers)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which the gradient of `weight` is kept: torch tells it of leaves, and not to its compiler."""
    plain = torch.compiler.is_compiling() or not weight.is_leaf
    return weight.dtype if plain else weight.grad_dtype or weight.dtype


class Runner:
    """Runs blocks and the final norm for one batch."""

    def __init__(self, kernels: Kernels, model: MobileLLM, tokens: Tensor, segments: Tensor | None) -> None:
        config = model.config
        B, T = tokens.shape
        visible: Tensor | None = None
        positions = torch.arange(T)
        if segments is not None:
            starts = document_starts(segments)
            positions = positions - starts
            visible = starts.to(torch.int32).contiguous()
        angle = angles(positions, config.head_dim, config.rope_theta)
        K, G = config.num_kv_heads, config.num_heads // config.num_kv_heads
        self.setting = Setting(
            kernels, products(kernels), B, T, K, G, config.head_dim, config.rms_norm_eps, visible,
            angle.cos().contiguous(), angle.sin().contiguous(), 1 if segments is None else B,
            gradient_dtype(model.head_weight),
        )  # fmt: skip
        self.tied, self.head_rounding = config.tie_word_embeddings, model.head_rounding
        self.head: Tensor | None = None
        """The weight to use for the head where it is the embedding's, after `embed`."""

    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, E) of tokens."""
        if not (self.tied and _plain(weight) and weight.requires_grad):
            return F.embedding(tokens, weight)
        function: Any = EmbeddingAndHead.apply
        x: Tensor
        x, self.head = function(self.setting, weight, tokens)
        return x

    def block(self, block: Block, x: Tensor) -> Tensor | None:
        """What `block` makes of x (B, T, E); None where its parts are not those this way knows."""
        attention, mlp = block.self_attn, block.mlp
        norms = (block.input_layernorm, block.post_attention_layernorm)
        groups = [
            self._maps(attention.q_proj, attention.k_proj, attention.v_proj), self._maps(attention.o_proj),
            self._maps(mlp.gate_proj, mlp.up_proj), self._maps(mlp.down_proj),
        ]  # fmt: skip
        known = all(_known(part, nn.RMSNorm) for part in norms)
        if not known or attention.kv_rounding is not None or x.dtype != torch.float32:
            return None
        qkv, o, gate_up, down = groups
        if qkv is None or o is None or gate_up is None or down is None:
            return None
        function: Any = Attention.apply
        x = function(self.setting, qkv[0], o[0], x, norms[0].weight, *qkv[1], *o[1])
        function = FeedForward.apply
        out: Tensor = function(self.setting, gate_up[0], down[0], x, norms[1].weight, *gate_up[1], *down[1])
        return out

    def _maps(self, *parts: nn.Module) -> tuple[Projection, list[Tensor]] | None:
        """Linear maps of one input, and their tensors; None where one is not such as this way knows."""
        adapted = [adapted_linear(part) for part in parts]
        linears = [part if each is None else each.linear for part, each in zip(parts, adapted, strict=True)]
        if not all(_known(linear, Linear) for linear in linears):
            return None
        tensors: list[Any] = [linear.weight for linear in linears]
        tensors += [tensor for each in adapted if each is not None for tensor in each.tensors]
        adapters = [None if each is None else each.adapter for each in adapted]
        if any(each is not None and each.has_magnitude and each.dropout for each in adapters):
            return None  # then the magnitude scales a product of its own, of what was not dropped
        roundings: list[Any] = [linear.rounding for linear in linears]
        assert all(each == roundings[0] for each in roundings), "what has one input rounds it in one way"
        if roundings[0] is not None and any(adapters):
            return None  # an adapter of peft's sees what was not rounded
        return Projection(self.setting.products, adapters, roundings[0]), tensors

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """The final norm (B, T, E), in bfloat16 as the head's product takes it, rounded as it rounds."""
        if not _known(norm, nn.RMSNorm) or x.dtype != torch.float32:
            plain: Tensor = norm(x)
            return plain if self.head_rounding is None else self.head_rounding(plain)
        function: Any = Norm.apply
        out: Tensor = function(self.setting, self.head_rounding, x, norm.weight)
        return out


def _known(part: Any, kind: type[nn.Module]) -> bool:
    """Neither wrapped nor replaced, no hooks; its weight a plain one, in bfloat16 only if frozen."""
    if type(part) is not kind:
        return False
    weight: Any = part.weight
    narrow = kind is Linear and weight.dtype == torch.bfloat16 and not weight.requires_grad
    return not has_hooks(part) and _plain(weight, torch.bfloat16 if narrow else torch.float32)


def _plain(weight: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype == dtype and weight.is_contiguous()
