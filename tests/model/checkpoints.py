"""How checkpoints are read, compared and refused in the tests of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mobilellm
from mobilellm.model.api import LoadedModel
from mobilellm.model.checkpoint import CheckpointError, read_weights


def equal(ours: Mapping[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """The same names, dtypes, shapes and bits."""
    return ours.keys() == wanted.keys() and all(
        tensor.dtype == wanted[name].dtype
        and tensor.shape == wanted[name].shape
        and torch.equal(tensor.contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8))
        for name, tensor in ours.items()
    )


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def quietly(source: Path, **options: Any) -> LoadedModel:
    return mobilellm.load(source, say=lambda line: None, **options)


def refused(directory: Path, kind: type[Exception] = CheckpointError) -> str:
    """The one line with which reading and loading are refused; it names the directory and nothing internal."""
    with pytest.raises(kind) as caught:
        read_weights(directory)
    message = str(caught.value)
    with pytest.raises(kind) as loading:
        quietly(directory)
    assert str(loading.value) == message
    assert "\n" not in message
    assert str(directory) in message
    return message
