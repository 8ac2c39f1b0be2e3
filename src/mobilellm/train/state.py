"""Checkpoints of a run: everything needed to go on bit-exactly, each whole or not there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from mobilellm.atomic import atomic_directory
from mobilellm.model.transformer import MobileLLM

_NAME = re.compile(r"step-(\d+)")


class RunState(NamedTuple):
    step: int  # steps done
    loader: dict[str, int]
    identity: str  # of the recipe: a checkpoint of another run is refused


def save_state(
    directory: Path, state: RunState, model: MobileLLM, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `directory/step-N` and drop all but the newest `keep`."""
    path = directory / f"step-{state.step:08d}"
    with atomic_directory(path, overwrite=True) as temporary:
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(weights, temporary / "model.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        torch.save(torch.get_rng_state(), temporary / "random.pt")
        (temporary / "state.json").write_text(json.dumps(state._asdict(), indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first (an unfinished one still has its temporary name)."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_state(path: Path, model: MobileLLM, optimizer: torch.optim.Optimizer, identity: str) -> RunState:
    """Restore weights, optimiser and random state in place. Raises ValueError if it is another run's."""
    try:
        values: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state = RunState(**values)
        weights = safetensors.torch.load_file(path / "model.safetensors")
        moments = torch.load(path / "optimizer.pt", weights_only=True)
        random = torch.load(path / "random.pt", weights_only=True)
    except Exception as error:  # any damage reads the same: this checkpoint cannot be used
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: damaged checkpoint ({reason}); delete it to resume from the one before"
        ) from None
    if state.identity != identity:
        raise ValueError(f"{path}: belongs to a run with other settings; use another folder or start afresh")
    model.load_state_dict(weights, strict=True)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(random)
    return state
