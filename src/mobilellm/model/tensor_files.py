"""The tensors of a model directory, read from whichever files hold them, without trusting any of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mobilellm.git_lfs import pointer_problem
from mobilellm.tokenizer import Tokenizer


class CheckpointError(ValueError):
    """Weights that are not, tensor for tensor, those the config describes, or files that are damaged."""


class TensorsInFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each read whenever it is asked for, and not kept.

    A model that is gone through this way, tensor by tensor, never lies in memory whole.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with _damage_told(file), safetensors.safe_open(file, "pt") as opened:
            self._names = dict.fromkeys(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        # What is mapped is the file, and what was touched of it stays in memory as long as a tensor does.
        with _damage_told(self._file), safetensors.safe_open(self._file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Selected(Mapping[str, Tensor]):
    """Tensors of one or several mappings, under other names or the same."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        """By name: where the tensor is, and what it is called there."""
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        tensors, there = self._places[name]
        return tensors[there]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_tensors(directory: Path, on_demand: bool = False) -> tuple[str, Mapping[str, Tensor]]:
    """Every tensor of the directory and the name of the file they came from (for messages).

    With `on_demand` safetensors files are read when a tensor is asked for.
    """
    safe: Callable[[Path], Mapping[str, Tensor]] = _on_demand if on_demand else read_safetensors
    for whole, read in (("model.safetensors", safe), ("pytorch_model.bin", _read_pickle)):
        index = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return str(directory / whole), read(directory / whole)
        if index.is_file():
            places: dict[str, tuple[Mapping[str, Tensor], str]] = {}
            for shard in _shards(index):
                found = read(shard)
                if twice := sorted(places.keys() & found.keys()):
                    raise CheckpointError(
                        f"{shard}: holds {some(twice)}, as another shard does; keep one of them"
                    )
                places |= {name: (found, name) for name in found}
            return str(index), Selected(places)
    raise FileNotFoundError(
        f"{directory}: no weights there; expected model.safetensors or pytorch_model.bin (or their index)"
    )


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError with the true errno, e.g. for a full disk."""
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file.touch()
    mode = file.stat().st_mode  # the library makes files that only their owner can read
    try:
        safetensors.torch.save_file(values, file, metadata)
    except safetensors.SafetensorError as error:  # the library keeps the errno in its text only
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        reason = os.strerror(code) if found else str(error)
        raise OSError(code, f"could not be written: {reason}", str(file)) from None
    file.chmod(mode)


def fingerprint(tensors: Mapping[str, Tensor], tokenizer: Tokenizer) -> str:
    """SHA-256 over weights, in the dtype they are stored in, and tokenizer: of equal models the same."""
    whole = hashlib.sha256(tokenizer.fingerprint.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: not a weight index; fetch it again") from None
    for name, shard in zip(names, shards, strict=True):
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{index}: shard {name!r} lies outside the directory; refused")
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: named by {index.name} and missing; fetch it again")
    return shards


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of one file. Raises CheckpointError."""
    _refuse_pointer(file)
    with _damage_told(file):
        return safetensors.torch.load_file(file)


def _on_demand(file: Path) -> TensorsInFile:
    _refuse_pointer(file)
    return TensorsInFile(file)


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        if "KeyboardInterrupt" in str(error):  # the library turns a Ctrl-C into an error of the file
            raise KeyboardInterrupt from None
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    _refuse_pointer(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about a pickle it then refuses
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # a damaged pickle makes the unpickler raise almost anything
        if isinstance(error, OSError) and error.filename is not None:  # cannot be opened: says so by itself
            raise
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{file}: the pickle wants {forbidden[1]}, which no tensor needs and which could run code; "
                "refused, nothing was run. Ask its author for safetensors"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's text recommends to load without care
            reason = "not a pickle of tensors"
        raise CheckpointError(f"{file}: damaged or truncated ({reason}); fetch it again") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: expected a state dict of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: expected a state dict of tensors, but {name!r} is {type(value).__name__}; keep the "
                "state dict of the model alone"
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _refuse_pointer(file: Path) -> None:
    if problem := pointer_problem(file):
        raise CheckpointError(f"{file}: {problem}")


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def some(items: list[str], separator: str = ", ", limit: int = 8) -> str:
    """The first `limit` items and how many more there are."""
    rest = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + rest
