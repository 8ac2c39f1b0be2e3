"""Adapters as directories in peft's own format, and the models they make with what they were trained on.

adapter_config.json          settings, and where the base model was
adapter_model.safetensors    the tensors; its metadata holds the fingerprint of the base's weights
tokenizer, chat template     those of the run, if it had any
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from mobilellm import hub
from mobilellm.atomic import atomic_directory, made_of
from mobilellm.chat_template import TEMPLATE_FILE, stored_template
from mobilellm.model import checkpoint
from mobilellm.model.adapters import fingerprint, merged
from mobilellm.model.tensor_files import CheckpointError, read_safetensors, some, write_tensors
from mobilellm.model.transformer import MobileLLM
from mobilellm.model_directory import ADAPTER_CONFIG
from mobilellm.tokenizer import Tokenizer

CONFIG, TENSORS = ADAPTER_CONFIG, "adapter_model.safetensors"
_FINGERPRINT = "mobilellm_base_sha256"
_PREFIX = "base_model.model."
_HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin with an adapter that leave the base as it is."""


class Merged(NamedTuple):
    """An adapter folded into its base, in float32."""

    model: MobileLLM
    tokenizer: Tokenizer | None
    chat_template: str | None
    base: Path
    repairs: tuple[str, ...]


def save_adapter(
    directory: Path, model: MobileLLM, base: str, tokenizer: Tokenizer | None, chat_template: str | None
) -> None:
    """Write the adapters of `model`, whole or not at all; an older adapter there is replaced.

    `base` is where the model is that they were put on: a whole path, or a Hub id.
    """
    import peft

    config: Any = model.peft_config["default"]  # type: ignore[index]
    config.base_model_name_or_path, config.inference_mode = base, True
    assert model.base_fingerprint is not None
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    files = (TENSORS, "README.md", "tokenizer*", "special_tokens_map.json", TEMPLATE_FILE)
    with atomic_directory(directory, overwrite=True, objection=made_of(CONFIG, *files)) as temporary:
        config.save_pretrained(str(temporary))
        named = {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}
        write_tensors(temporary / TENSORS, named, {"format": "pt", _FINGERPRINT: model.base_fingerprint})
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=model.config.max_position_embeddings)
        if chat_template is not None:
            (temporary / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def merge_adapter(directory: Path, base: str | Path | None, say: Callable[[str], None]) -> Merged:
    """Fold an adapter into `base`, by default the model that it names.

    Raises ValueError or FileNotFoundError, one line: for what is no LoRA or DoRA adapter, for a base of
    another shape or with other weights than it was trained on, and ImportError without peft.
    """
    config = _read_config(directory)
    source = base or config.base_model_name_or_path
    if not source:
        raise ValueError(f"{directory}: does not say what it was trained on; name the model with --model")
    try:
        place = hub.resolve(source, say)
    except FileNotFoundError as error:
        if base is not None:
            raise
        raise FileNotFoundError(
            f"{directory}: was trained on {source}, which is not there; name the model with --model ({error})"
        ) from None
    weights = checkpoint.read_weights(place)
    if weights.quantized is not None:
        raise ValueError(f"{source}: {checkpoint.cannot_be_plain(weights.quantized.quantization)}")
    model = checkpoint.build(weights, torch.float32)
    stated = _put_on(directory, config, model, str(source))
    found = fingerprint(weights.tensors) if stated else None
    if stated and stated != found:
        raise ValueError(
            f"{directory}: was trained on other weights than those of {source} (SHA-256 {stated[:12]}…, not "
            f"{str(found)[:12]}…); name the right ones with --model"
        )
    if not stated:
        say(
            f"{directory}: does not say which weights it was trained on; that they are those of {source} is "
            "not checked"
        )
    tokenizer = None
    for whose in (directory, place):
        if tokenizer is None and any(
            (whose / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
        ):
            tokenizer = Tokenizer.load(whose)
            checkpoint.check_fit(tokenizer, model.config, str(whose))
    template = stored_template(directory) or stored_template(place)
    repairs = weights.repairs + (tokenizer.repairs if tokenizer else ())
    return Merged(merged(model), tokenizer, template, place, repairs)


def _read_config(directory: Path) -> Any:
    """The peft.LoraConfig of an adapter."""
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(
            f"{directory}: no {CONFIG} there; name an adapter, or a run with [lora] that has one"
        )
    import peft

    try:
        kind = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        if kind != "LORA":
            raise ValueError(f"peft_type is {kind}; only LoRA and DoRA can be merged")
        config: Any = peft.LoraConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory / CONFIG}: {' '.join(str(error).split())}") from None
    if config.init_lora_weights not in _HARMLESS:
        raise ValueError(
            f"{directory}: init_lora_weights = {config.init_lora_weights!r} changes the base model too; save "
            "it with peft as a plain LoRA (path_initial_model_for_weight_conversion)"
        )
    config.init_lora_weights = False  # all is overwritten
    return config


def _put_on(directory: Path, config: Any, model: MobileLLM, source: str) -> str:
    """Put the adapter on `model` in place; the fingerprint of its base, or "" if it states none."""
    import peft

    file = directory / TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: {TENSORS} is missing; copy the whole adapter")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_safetensors(file).items()}
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: does not fit {source} ({reason})") from None
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if problems := _differences(tensors, expected):
        raise CheckpointError(
            f"{directory}: is the adapter of another model than {source} ({some(problems, '; ', 3)})"
        )
    peft.set_peft_model_state_dict(model, tensors)
    with safetensors.safe_open(file, "pt") as stream:
        return str((stream.metadata() or {}).get(_FINGERPRINT, ""))


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} has no place in it" for name in sorted(found.keys() - expected.keys())]
    return problems + [
        f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
