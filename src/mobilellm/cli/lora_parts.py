"""What [lora] does to a run: adapters on the model, evaluations of it merged, an adapter at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mobilellm.train.lora import LoraChoice, adapter_parameters, flops_not_needed
from mobilellm.train.memory import takes_kernels
from mobilellm.train.recipe import Recipe

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.tokenizer import Tokenizer

Result = TypeVar("Result")


def put_on(model: MobileLLM, lora: LoraChoice, recipe: Recipe) -> None:
    """Fresh adapters on a trained model; on a CPU its frozen matrices are then held in bfloat16."""
    from mobilellm.model.adapters import adapt, narrow

    adapt(model, **asdict(lora), seed=recipe.seed)
    if takes_kernels(recipe):  # what the modules of peft compute wants the norms of exact rows
        narrow(model)


def of_merged(function: Callable[[MobileLLM, int], Result]) -> Callable[[MobileLLM, int], Result]:
    """An evaluator or a speaker that is given the merged model, in float32: what `merge` will write."""
    from mobilellm.model.adapters import merged

    return lambda model, step: function(merged(model), step)


def keep(
    out: Path, model: MobileLLM, source: str | Path, tokenizer: Tokenizer, chat_template: str | None
) -> None:
    """Write out/adapter. It names `source`, the model it is for, by a path that holds anywhere here."""
    from mobilellm import hub
    from mobilellm.model.adapter_files import save_adapter

    local = hub.local_path(source).is_dir()
    base = os.path.realpath(hub.resolve(source, lambda notice: None)) if local else str(source)
    save_adapter(out / "adapter", model, base, tokenizer, chat_template)


def changed_card(card: dict[str, Any], lora: LoraChoice, config: ModelConfig) -> dict[str, Any]:
    """run.json of such a run: what is trained, and the FLOPs that takes."""
    spared = flops_not_needed(lora, config)
    return card | {
        "trained_parameters": adapter_parameters(lora, config),
        "flops_per_token": card["flops_per_token"] - spared,
        "flops_per_token_6n": card["flops_per_token_6n"] - spared,
    }
