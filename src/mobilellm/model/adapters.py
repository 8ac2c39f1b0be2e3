"""LoRA and DoRA on a model of ours, by `peft`: put on, held lean, and folded into the weights again.

An adapter sits on a stored block: where layers are shared, every repeat of the block uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobilellm.model import cpu_kernels
from mobilellm.model.adapted import AdaptedLinear, adapted_linear, is_adapted
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.tensor_files import CheckpointError
from mobilellm.model.transformer import MobileLLM


def adapt(
    model: MobileLLM,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    dora: bool,
    rslora: bool,
    seed: int,
) -> None:
    """Put fresh adapters on a model, in place; nothing but them is trained from then on.

    A new adapter changes nothing: B is zero, and a magnitude is the norm that is there. A is drawn from
    `seed`. Settings as in `train.lora.LoraChoice`, which checks them.
    """
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        use_dora=dora,
        use_rslora=rslora,
    )
    model.base_fingerprint = fingerprint(dict(model.named_parameters()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


def narrow(model: MobileLLM) -> bool:
    """Hold the frozen matrices of the blocks in bfloat16, if training on a CPU in bfloat16 can take them so.

    Its products round them to that in any case. Says whether it was done.
    """
    if model.head_weight.device.type != "cpu" or not isinstance(cpu_kernels.load(), Kernels):
        return False
    for layer in model.model.layers.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear) and isinstance(weight, nn.Parameter) and not weight.requires_grad:
            layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
    return True


def merged(model: MobileLLM) -> MobileLLM:
    """A plain model, in float32, that computes what `model` does with its adapters. Shares what has none.

    Raises CheckpointError for an adapter of a kind that this does not know.
    """
    tensors: dict[str, Tensor] = {}
    inside = list[str]()
    for name, part in model.named_modules():
        if is_adapted(part):
            tensors[f"{name}.weight"] = _folded(name, adapted_linear(part))
            inside.append(f"{name}.")
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(inside)):
            tensors[name] = parameter.detach().float()
    with torch.device("meta"):
        plain = MobileLLM(model.config)
    try:
        plain.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"adapters of another kind than LoRA: {' '.join(str(error).split())}") from None
    return plain.eval()


@torch.no_grad()
def _folded(name: str, adapted: AdaptedLinear | None) -> Tensor:
    """W + s B A, its rows scaled to the magnitude where there is one, in float32."""
    if adapted is None:
        raise CheckpointError(
            f"{name}: has an adapter that cannot be merged here (several at once, biases, or a variant other "
            "than LoRA and DoRA)"
        )
    weight: Any = adapted.linear.weight
    low, high, *magnitude = (tensor.float() for tensor in adapted.tensors)
    moved = torch.addmm(weight.float(), high, low, alpha=adapted.adapter.scaling)
    if magnitude:
        moved *= (magnitude[0] / torch.linalg.vector_norm(moved, dim=1))[:, None]
    return moved


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights by their names, shapes and values, in whatever dtype or files they lie."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
