"""A quantised model directory: whole numbers and their scales, and the model that runs exactly those.

    quantized.safetensors   NAME.codes and NAME.scales of every quantised matrix (R, C), the rest by itself
    quantization.json       the scheme, what is rounded before products, how it was made and measured

A weight is code * scale, in float32. Scales are (R, C / group): of runs of `group` numbers of a row. Codes of
8 bits are int8 (R, C); those of 4 bits, -8 … 7, are uint8 (R, C / 2) with 8 added, the first of a pair in the
low half. `mobilellm.load` reads such a directory as any other; export takes codes and scales as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mobilellm.model.rounding import ROUNDINGS, Rounding
from mobilellm.model.tensor_files import CheckpointError, read_safetensors, some
from mobilellm.model.transformer import Attention, Linear, MobileLLM

WEIGHTS, DESCRIPTION = "quantized.safetensors", "quantization.json"
FORMAT = 1
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CODES, _SCALES = ".codes", ".scales"


class Matrix(NamedTuple):
    """A quantised matrix."""

    codes: Tensor
    """int8 (R, C)"""
    scales: Tensor
    """float32, float16 or bfloat16 (R, C / group)"""
    bits: int
    """In which a code is stored: 8, or 4 for -8 … 7."""

    def values(self) -> Tensor:
        """float32 (R, C)"""
        rows, columns = self.codes.shape
        runs = self.codes.view(rows, self.scales.shape[1], -1).float()
        return (runs * self.scales.float()[..., None]).view(rows, columns)


@dataclass(frozen=True)
class Quantization:
    """What a quantised model is, beyond its weights."""

    scheme: str
    linear: str
    """The format of the blocks' matrices, by name (`quant/formats.py`)."""
    embedding: str
    """That of embedding and head."""
    activations: Rounding | None
    """Before products with quantised matrices, the head's included."""
    kv: Rounding | None
    """Of keys and values, on their way into the cache."""
    bytes: int
    """Of codes, scales and all other tensors."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "linear": self.linear,
            "embedding": self.embedding,
            "activations": None if self.activations is None else self.activations.name,
            "kv": None if self.kv is None else self.kv.name,
            "bytes": self.bytes,
        }


class Origin(NamedTuple):
    """What a quantised model was made of, and how."""

    sha256: str
    """The `fingerprint` of its weights and tokenizer, as they were stored."""
    method: str
    """rtn or gptq"""


class Quantized(NamedTuple):
    """A directory as read."""

    quantization: Quantization
    matrices: dict[str, Matrix]
    others: dict[str, Tensor]
    """What is not quantised: norms, and matrices that the format's groups do not divide."""
    origin: Origin | None = None
    """None where it is not told: in directories of older versions."""

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its checkpoint name, as numbers."""
        return {**{name: matrix.values() for name, matrix in self.matrices.items()}, **self.others}


def is_quantized(directory: Path) -> bool:
    return (directory / DESCRIPTION).is_file()


def read_quantized(directory: Path) -> Quantized:
    """Raises FileNotFoundError or CheckpointError with one line."""
    if there := next((name for name in _OTHER_WEIGHTS if (directory / name).exists()), None):
        raise CheckpointError(
            f"{directory}: holds {there} beside {DESCRIPTION}, so that it is two models; remove one of them"
        )
    if not (directory / WEIGHTS).is_file():
        raise FileNotFoundError(f"{directory / WEIGHTS}: missing; fetch or make the quantised model again")
    stored = read_safetensors(directory / WEIGHTS)
    quantization, origin = _described(directory / DESCRIPTION, tensors_bytes(stored))
    matrices, others = {}, {}
    for name, tensor in stored.items():
        if name.endswith(_CODES):
            matrix = name.removesuffix(_CODES)
            matrices[matrix] = _matrix(
                tensor, stored.get(matrix + _SCALES), f"{directory / WEIGHTS}: {matrix}"
            )
        elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _CODES in stored):
            others[name] = tensor
    if twice := sorted(matrices.keys() & others.keys()):
        raise CheckpointError(f"{directory / WEIGHTS}: holds {some(twice)} quantised and plain; keep one")
    return Quantized(quantization, matrices, others, origin)


def stored_tensors(matrices: dict[str, Matrix], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file."""
    tensors = dict(others)
    for name, matrix in matrices.items():
        tensors[name + _CODES] = packed(matrix.codes) if matrix.bits == 4 else matrix.codes
        tensors[name + _SCALES] = matrix.scales
    return tensors


def tensors_bytes(tensors: dict[str, Tensor]) -> int:
    """Of all tensors, without the head of a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def packed(codes: Tensor) -> Tensor:
    """Codes -8 … 7, int8 (R, C) with C even, as uint8 (R, C / 2)."""
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpacked(pairs: Tensor) -> Tensor:
    """The inverse of `packed`."""
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).to(torch.int8) - 8


def attach(model: MobileLLM, quantization: Quantization, quantized: set[str]) -> None:
    """Let `model`, which holds the quantised weights, round as the scheme says.

    Products with matrices that are not in `quantized` take their input as it is.
    """
    for name, part in model.named_modules():
        if isinstance(part, Linear) and f"{name}.weight" in quantized:
            part.rounding = quantization.activations
        if isinstance(part, Attention):
            part.kv_rounding = quantization.kv
    head = _EMBEDDING if model.lm_head is None else _HEAD
    model.head_rounding = quantization.activations if head in quantized else None
    model.quantization = quantization


def detach(model: MobileLLM) -> None:
    """Let `model` round nothing any more: the inverse of `attach`."""
    for part in model.modules():
        if isinstance(part, Linear):
            part.rounding = None
        if isinstance(part, Attention):
            part.kv_rounding = None
    model.head_rounding = model.quantization = None


_OTHER_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def _described(file: Path, size: int) -> tuple[Quantization, Origin | None]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{file}: format = {values['format']!r} is not known; this version reads {FORMAT}"
            )
        described = Quantization(
            scheme=str(values["scheme"]),
            linear=str(values["linear"]),
            embedding=str(values["embedding"]),
            activations=_rounding(values["activations"]),
            kv=_rounding(values["kv"]),
            bytes=values["bytes"],
        )
        stated = values.get("origin")
        origin = stated and Origin(str(stated["sha256"]), str(stated["method"]))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: is no description of a quantised model ({error!r}); make it again"
        ) from None
    if described.bytes != size:
        raise CheckpointError(
            f"{file}: speaks of {described.bytes:,} bytes of tensors and {WEIGHTS} has {size:,}: they are "
            "not of one model"
        )
    return described, origin


def _rounding(name: str | None) -> Rounding | None:
    return None if name is None else ROUNDINGS[name]


def _matrix(codes: Tensor, scales: Tensor | None, where: str) -> Matrix:
    if scales is None or scales.ndim != 2 or not scales.is_floating_point():
        raise CheckpointError(f"{where}: has codes and no scales; make the quantised model again")
    bits = 8
    if codes.ndim == 2 and codes.dtype == torch.uint8:
        codes, bits = unpacked(codes), 4
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise CheckpointError(
            f"{where}: codes are {codes.dtype} {list(codes.shape)}; expected a matrix of int8"
        )
    rows, columns = codes.shape
    if scales.shape[0] != rows or scales.shape[1] == 0 or columns % scales.shape[1]:
        raise CheckpointError(
            f"{where}: codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together"
        )
    return Matrix(codes, scales, bits)
