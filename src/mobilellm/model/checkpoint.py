"""Model directories, strict both ways: config.json + weights in, one clean verified directory out.

What is read: safetensors or pytorch_model.bin (weights-only unpickling), whole or sharded, in every layout
the official checkpoints are found in. What is known to be broken is repaired and said; anything else is
refused. No tensor is ever left at an initial value. docs/official-checkpoints.md lists the layouts and their
faults.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mobilellm.atomic import atomic_directory
from mobilellm.chat_template import TEMPLATE_FILE
from mobilellm.config import ModelConfig
from mobilellm.layouts import ConfigFile, config_json
from mobilellm.model.quantized import Quantization, Quantized, attach, is_quantized, read_quantized
from mobilellm.model.tensor_files import CheckpointError, Selected, read_tensors, some, write_tensors
from mobilellm.model.transformer import MobileLLM
from mobilellm.model_directory import not_a_model_directory, read_config_file
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REMOTE_CODE = ("configuration_mobilellm.py", "modeling_mobilellm.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name. Raises ValueError."""
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


class Weights(NamedTuple):
    """A checkpoint as read: exactly the parameters of MobileLLM(config), and what was repaired."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    model_type: str
    repairs: tuple[str, ...]
    quantized: Quantized | None = None
    """Of a quantised model: what `tensors`, in float32, are the values of."""


def read_weights(directory: str | Path, on_demand: bool = False) -> Weights:
    """Read and check the weights of a model directory, in the dtype they are stored in.

    With `on_demand` they do not stay in memory (but those of pickles and of quantised models): each is read
    again when it is asked for.
    Raises FileNotFoundError, ConfigError or CheckpointError, each naming file, tensor, value and mend.
    """
    directory = Path(directory)
    described = read_config_file(directory)
    quantized = read_quantized(directory) if is_quantized(directory) else None
    if quantized is None:
        source, tensors = read_tensors(directory, on_demand)
    else:
        source, tensors = str(directory), quantized.tensors()
    tensors, repairs = _repair(tensors, described, source)
    if problems := _problems(tensors, described.config):
        raise CheckpointError(
            f"{source}: {problems}; weights and config.json must be of one model, fetch both again"
        )
    return Weights(described.config, tensors, described.model_type, described.repairs + repairs, quantized)


def stored_dtype(weights: Weights) -> torch.dtype:
    """The dtype of the stored tensors; of several, one that holds them all exactly."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in weights.tensors.values()})


def build(weights: Weights, dtype: torch.dtype | None = None, device: str = "cpu") -> MobileLLM:
    """A model in evaluation mode holding these very tensors.

    Without a dtype the stored one is kept, except float16 on a CPU, which becomes float32 (exact, and fast).
    Raises CheckpointError for a weight too large for `dtype`.
    """
    if dtype is None:
        dtype = stored_dtype(weights)
        if dtype == torch.float16 and torch.device(device).type == "cpu":
            dtype = torch.float32
    with torch.device("meta"):
        model = MobileLLM(weights.config)
    tensors, addresses = {}, set()
    for name, stored in weights.tensors.items():
        tensor = stored.to(device, dtype).contiguous()
        if torch.finfo(dtype).max < torch.finfo(stored.dtype).max and not _finite(tensor):
            raise CheckpointError(f"{name} has values too large for {dtype}; load it in bfloat16 or float32")
        if tensor.data_ptr() in addresses:  # two names of one tensor in the file; here they are two weights
            tensor = tensor.clone()
        addresses.add(tensor.data_ptr())
        tensors[name] = tensor
    model.load_state_dict(tensors, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    if weights.quantized is not None:
        attach(model, weights.quantized.quantization, set(weights.quantized.matrices))
    return model.eval()


def save(
    directory: str | Path,
    model: MobileLLM,
    tokenizer: Tokenizer | None,
    layout: str | None = None,
    overwrite: bool = False,
    further_files: Sequence[Path] = (),
    chat_template: str | None = None,
) -> None:
    """Write a clean model directory, whole or not at all, read back and compared before it gets its name.

    `layout` is "llama" (loads in stock transformers; no sharing) or "mobilellm" (carries its modelling code
    for `trust_remote_code`); by default "mobilellm" when layers are shared, else "llama". `further_files`
    (the licence, say) are copied beside; `chat_template` makes it a model to talk to. Raises what
    `atomic_directory` raises, and CheckpointError for what could not be loaded again, e.g. NaN.
    """
    config = model.config
    layout = layout or ("mobilellm" if config.shares_layers else "llama")
    if model.quantization is not None:
        raise CheckpointError(f"{directory}: {cannot_be_plain(model.quantization)}")
    check_fit(tokenizer, config, str(directory))
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    values = config_json(config, layout, dtype)
    if problems := _problems(model.state_dict(), config):
        raise CheckpointError(f"{directory}: not saved, for it could not be loaded: {problems}")
    with atomic_directory(directory, overwrite, not_a_model_directory) as temporary:
        _write_json(temporary / "config.json", values)
        _write_json(
            temporary / "generation_config.json",
            {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
        )
        write_tensors(temporary / "model.safetensors", model.state_dict(), {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=config.max_position_embeddings)
        if chat_template is not None:
            (temporary / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        if layout == "mobilellm":
            for name in REMOTE_CODE:
                code = (files("mobilellm") / "hf" / name).read_text(encoding="utf-8")
                (temporary / name).write_text(code, encoding="utf-8")
        for file in further_files:
            shutil.copyfile(file, temporary / file.name)
        _compare(temporary, model, tokenizer)


def _compare(directory: Path, model: MobileLLM, tokenizer: Tokenizer | None) -> None:
    """Read a written directory back, strictly, and compare it with what it was made from."""
    written = read_weights(directory)
    different = [
        name for name, tensor in model.state_dict().items() if not _same(written.tensors[name], tensor.cpu())
    ]
    if different or written.repairs:
        raise CheckpointError(f"{directory}: reads back different ({different or written.repairs}); not kept")
    if tokenizer is not None and Tokenizer.load(directory).fingerprint != tokenizer.fingerprint:
        raise CheckpointError(f"{directory}: the tokenizer reads back different; not kept")


def cannot_be_plain(quantization: Quantization) -> str:
    """Why a quantised model is not written as plain weights, and what to do instead."""
    return (
        f"the model is quantised ({quantization.scheme}), which a directory of plain weights cannot say; "
        "export it, or convert what it was made from"
    )


def check_fit(tokenizer: Tokenizer | None, config: ModelConfig, source: str) -> None:
    """A tokenizer must not produce ids that the embedding does not have. Raises CheckpointError."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens and the embedding "
            f"{config.vocab_size} rows; they do not belong together, use the model's own tokenizer"
        )


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch or this machine does not have, or that holds no values."""
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = re.split(r"\. |\n", str(error))[0].rstrip(".")
        if device.startswith("meta"):
            reason = "it holds no values"
        elif "aten::" in reason or "INTERNAL ASSERT" in reason:
            reason = "this torch cannot compute on it"
        raise ValueError(f"device = {device!r} cannot be used ({reason}); use cpu") from None


def unroll(model: MobileLLM) -> MobileLLM:
    """The same function without sharing: every executed step becomes a stored block (copied weights)."""
    with torch.device("meta"):
        twin = MobileLLM(model.config.unrolled())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".layers." not in name}
    for step, index in enumerate(model.config.schedule):
        for name, tensor in model.model.layers[index].state_dict().items():
            tensors[f"model.layers.{step}.{name}"] = tensor.clone()
    twin.load_state_dict(tensors, strict=True, assign=True)
    return twin.train(model.training)


def _repair(
    tensors: Mapping[str, Tensor], described: ConfigFile, source: str
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Undo the known faults of official and converted checkpoints; say which were found."""
    names, repairs = {name: name for name in tensors}, []
    buffers = [name for name in tensors if name.endswith(".rotary_emb.inv_freq")]
    for name in buffers:
        _check_rotary_table(tensors[names.pop(name)], described.config, f"{source}: {name}")
    if buffers:
        repairs.append(f"{len(buffers)} stored rotary tables dropped (they follow from rope_theta)")
    if not described.config.tie_word_embeddings or HEAD not in tensors:
        pass
    elif EMBEDDING not in tensors:
        names[EMBEDDING] = names.pop(HEAD)
        repairs.append(
            f"{EMBEDDING} was missing and its tensor stored as {HEAD} (the automatic safetensors "
            "conversion does this): put back"
        )
    elif _same(tensors[HEAD], tensors[EMBEDDING]):
        del names[HEAD]
        repairs.append(f"{HEAD} was stored a second time beside the tied {EMBEDDING}: dropped")
    elif described.model_type == "mobilellm":
        del names[HEAD]
        repairs.append(
            f"{HEAD} is stored and differs from {EMBEDDING}, but share_embedding is true and the official "
            "code never uses it (so in MobileLLM-1B): dropped"
        )
    else:
        raise CheckpointError(
            f"{source}: config.json says tie_word_embeddings = true but {HEAD} differs from {EMBEDDING}; "
            "delete one of them or set tie_word_embeddings to false"
        )
    return Selected({name: (tensors, old) for name, old in names.items()}), tuple(repairs)


def _check_rotary_table(table: Tensor, config: ModelConfig, source: str) -> None:
    """A stored table must be the one config.json describes, to the precision of 16 bits."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wanted = config.rope_theta**-exponents
    if table.shape != wanted.shape or not torch.allclose(table.float(), wanted, rtol=0.01, atol=1e-6):
        raise CheckpointError(
            f"{source} is not the rotary table of head_dim = {config.head_dim} and rope_theta = "
            f"{config.rope_theta}; correct config.json, or remove the tensor"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _problems(tensors: Mapping[str, Tensor], config: ModelConfig) -> str:
    """All that is wrong with names, shapes, dtypes and values, or ""."""
    with torch.device("meta"):
        expected = MobileLLM(config).state_dict()
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing tensors {some(missing)}")
        if missing == [HEAD]:
            problems.append("set tie_word_embeddings to true in config.json if the embedding was shared")
    if extra := sorted(tensors.keys() - expected.keys()):
        problems.append(f"unknown tensors {some(extra)}")
    for name in [name for name in expected if name in tensors]:
        tensor, wanted = tensors[name], tuple(expected[name].shape)
        if tuple(tensor.shape) != wanted:
            problems.append(f"{name} has shape {tuple(tensor.shape)} where config.json gives {wanted}")
        elif tensor.dtype not in DTYPES.values():
            problems.append(f"{name} has dtype {tensor.dtype}; only {', '.join(DTYPES)} are weights")
        elif tensor.is_meta or tensor.layout != torch.strided:
            problems.append(f"{name} is a tensor without plain values")
        elif not _finite(tensor):
            problems.append(f"{name} holds NaN or infinity")
    return some(problems, "; ")


def _finite(tensor: Tensor) -> bool:
    # A sum is one quick pass and carries any NaN or infinity; only its own overflow needs the slow check.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _write_json(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
