"""From weights to a quantised model, and to the directory that `mobilellm.load` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mobilellm.atomic import atomic_directory
from mobilellm.layouts import config_json
from mobilellm.licence import licence_files
from mobilellm.model import checkpoint, quantized
from mobilellm.model.checkpoint import Weights
from mobilellm.model.quantized import Matrix, Quantized
from mobilellm.model.tensor_files import CheckpointError, write_tensors
from mobilellm.model.transformer import MobileLLM
from mobilellm.model_directory import not_a_model_directory
from mobilellm.quant.schemes import Scheme
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer

_CARRIED = ("chat_template.jinja",)
"""Files of the source that go along, beside its licence texts."""


def assemble(model: MobileLLM, scheme: Scheme, matrices: Mapping[str, Matrix]) -> Quantized:
    """What is stored: the quantised matrices, norms in float32, the rest in float16.

    Raises ValueError for a weight that float16 cannot hold. The size is what the scheme predicted.
    """
    others = {}
    for name, parameter in model.named_parameters():
        if name not in matrices:
            dtype = torch.float32 if parameter.ndim == 1 else torch.float16
            others[name] = parameter.detach().to("cpu", dtype)
            if not bool(torch.isfinite(others[name]).all()):
                raise ValueError(f"{name}: there are numbers above 65,504, which float16 cannot hold")
    size = quantized.tensors_bytes(quantized.stored_tensors(dict(matrices), others))
    predicted = scheme.size(model.config).bytes
    assert size == predicted, f"{size} bytes are there and {predicted} were predicted"
    return Quantized(scheme.described(size), dict(matrices), others)


def quantized_model(source: MobileLLM, stored: Quantized) -> MobileLLM:
    """The model that `mobilellm.load` would give, without the way over a disk."""
    return checkpoint.build(Weights(source.config, stored.tensors(), "", (), stored))


def save(
    destination: str | Path,
    source: MobileLLM,
    stored: Quantized,
    tokenizer: Tokenizer | None,
    report: Mapping[str, Any],
    overwrite: bool = False,
    origin: Path | None = None,
) -> None:
    """Write a quantised model directory, whole or not at all, read back and compared before it gets its name.

    `report` (how it was made, what was measured) goes into quantization.json. Chat template and licence texts
    are copied from the directory `origin`.
    """
    config = source.config
    values = config_json(config, "mobilellm" if config.shares_layers else "llama", "float32")
    values.pop("auto_map", None)  # there is no code of transformers that runs it
    further = [] if origin is None else licence_files(origin)
    if origin is not None:
        further += [origin / name for name in _CARRIED if (origin / name).is_file()]
    origin_told = None if stored.origin is None else stored.origin._asdict()
    description = {
        "format": quantized.FORMAT, **stored.quantization.to_dict(), "origin": origin_told, "report": report,
    }  # fmt: skip
    with atomic_directory(destination, overwrite, not_a_model_directory) as temporary:
        for name, content in (
            ("config.json", values),
            (
                "generation_config.json",
                {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
            ),
            (quantized.DESCRIPTION, description),
        ):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tensors = quantized.stored_tensors(stored.matrices, stored.others)
        write_tensors(temporary / quantized.WEIGHTS, tensors, {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=config.max_position_embeddings)
        for file in further:
            shutil.copyfile(file, temporary / file.name)
        _compare(temporary, stored)


def _compare(directory: Path, stored: Quantized) -> None:
    found = checkpoint.read_weights(directory).quantized
    same = (
        found is not None
        and found.quantization == stored.quantization
        and found.origin == stored.origin
        and found.matrices.keys() == stored.matrices.keys()
        and found.others.keys() == stored.others.keys()
        and all(torch.equal(found.others[name], tensor) for name, tensor in stored.others.items())
        and all(
            torch.equal(found.matrices[name].codes, matrix.codes)
            and torch.equal(found.matrices[name].scales, matrix.scales)
            for name, matrix in stored.matrices.items()
        )
    )
    if not same:
        raise CheckpointError(f"{directory}: reads back different; not kept")
