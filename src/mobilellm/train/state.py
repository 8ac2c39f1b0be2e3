"""Checkpoints of a run: everything needed to go on bit-exactly, each whole or not there.

step-00000100/model.safetensors       weights, by the names of the model
step-00000100/training.safetensors    the optimiser's tensors as optimizer.PARAMETER.NAME, and torch's
                                      random state
step-00000100/state.json              RunState
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mobilellm.atomic import atomic_directory
from mobilellm.model.tensor_files import write_tensors
from mobilellm.model.transformer import MobileLLM

_NAME = re.compile(r"step-([0-9]+)")
_REMAINS = re.compile(r"step-[0-9]+\.(tmp-.*|deleted)")
_RANDOM = "random"


class RunState(NamedTuple):
    step: int  # steps done
    loader: dict[str, int]
    identity: dict[str, Any]  # of the recipe: a checkpoint of another run is refused


def save_state(
    directory: Path, state: RunState, model: MobileLLM, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `directory/step-N` and drop all but the newest `keep`. Raises OSError, e.g. for a full disk."""
    path = directory / f"step-{state.step:08d}"
    with atomic_directory(path, overwrite=True) as temporary:
        write_tensors(temporary / "model.safetensors", model.state_dict())
        moments = {
            f"optimizer.{index}.{name}": tensor
            for index, tensors in optimizer.state_dict()["state"].items()
            for name, tensor in tensors.items()
        }
        write_tensors(temporary / "training.safetensors", {**moments, _RANDOM: torch.get_rng_state()})
        (temporary / "state.json").write_text(json.dumps(state._asdict(), indent=2) + "\n", encoding="utf-8")
    drop_old(directory, keep)
    return path


def drop_old(directory: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`."""
    for old in checkpoints(directory)[:-keep]:
        # A kill while the files go must not leave what looks like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f"{old.name}.deleted")))


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first (an unfinished one still has its temporary name)."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def load_state(
    path: Path, model: MobileLLM, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> RunState:
    """Restore weights, optimiser and random state in place.

    Raises ValueError, before anything is changed, if the checkpoint is damaged or another run's.
    """
    try:
        state = _read_json(path / "state.json")
        weights = safetensors.torch.load_file(path / "model.safetensors")
        training = safetensors.torch.load_file(path / "training.safetensors")
    except (ValueError, TypeError, RecursionError, FileNotFoundError, safetensors.SafetensorError) as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    ours = json.loads(json.dumps(identity))
    if differences := [
        f"{name} = {state.identity.get(name)!r}, not {ours.get(name)!r}"
        for name in sorted(ours.keys() | state.identity.keys())
        if ours.get(name) != state.identity.get(name)
    ]:
        raise ValueError(
            f"{path}: belongs to a run with other settings ({'; '.join(differences)}); "
            "use another folder or the same settings"
        )
    if _shapes(weights) != _shapes(model.state_dict()):
        raise _damaged(path, "model.safetensors holds other tensors than the model")
    random, moments = training.pop(_RANDOM, torch.empty(0)), _moments(training, optimizer)
    if moments is None or _shapes({"": random}) != _shapes({"": torch.get_rng_state()}):
        raise _damaged(path, "training.safetensors holds other tensors than optimiser and torch have")
    model.load_state_dict(weights, strict=True)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(random)
    return state


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Hold the folder of a run for this process, and clear what a killed one left half done.

    Raises ValueError while another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot lock
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{directory}: another process is training there; wait for it or use another folder"
                ) from None
        for path in directory.iterdir():
            if _REMAINS.fullmatch(path.name):
                shutil.rmtree(path)
        yield
    finally:
        os.close(descriptor)


def _read_json(file: Path) -> RunState:
    state = RunState(**json.loads(file.read_text(encoding="utf-8")))
    for field, kind in (("step", int), ("loader", dict), ("identity", dict)):
        if type(getattr(state, field)) is not kind:
            raise ValueError(f"{field} in {file.name} must be {kind.__name__}")
    return state


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _moments(
    stored: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]] | None:
    """The optimiser's tensors by parameter; None if they do not fit its parameters."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = re.fullmatch(r"optimizer\.([0-9]+)\.(\w+)", key)
        if match is None or int(match[1]) >= len(shapes):
            return None
        if tensor.ndim and tensor.shape != shapes[int(match[1])]:
            return None
        moments.setdefault(int(match[1]), {})[match[2]] = tensor
    return moments


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: damaged checkpoint ({reason}); delete it to resume from the one before")
