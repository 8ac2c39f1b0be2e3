"""`mobilellm train` in several processes of which one fails, in ways that its name in FAILURES tells."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from gloo_processes import Ended, run_processes

Patch = contextlib.AbstractContextManager[Any]
RECIPE = """
steps = 12
evaluate_every = 4
[model]
preset = "test-ls"
[data]
train = ["shards"]
held_out_tokens = 200
[batch]
tokens_per_step = 64
sequence_length = 16
micro_batch = 1
[schedule]
warmup_steps = 5
[compute]
precision = "float32"
[checkpoint]
every = 3
[log]
tensorboard = false
"""
WHO = 1
"""The rank that fails, when it is first started."""


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file of mine")


def _unreadable() -> None:
    raise ValueError("shards/train-00000.bin: its sha256 differs")


def _asked() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _at_call(place: str, number: int, action: Callable[[], Any]) -> Patch:
    """Do `action` before what stands at `place` is called for the `number`th time."""
    import importlib

    module, _, name = place.rpartition(".")
    holder: Any
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError:  # a class
        outer, _, inner = module.rpartition(".")
        holder = getattr(importlib.import_module(outer), inner)
    whole, calls = getattr(holder, name), 0

    def patched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return whole(*arguments, **options)

    return mock.patch.object(holder, name, patched)


def _spoilt(number: int) -> Patch:
    from mobilellm.train import loss

    whole, calls = loss.weighted_loss, 0

    def spoilt(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(*arguments, **options) * (float("nan") if calls == number else 1.0)

    return mock.patch.object(loss, "weighted_loss", spoilt)


STEP, EVALUATION = "mobilellm.train.distributed.Spread.clip", "mobilellm.eval.perplexity.windowed"
BATCH, SAVE = "mobilellm.data.loader.PackedLoader.next", "mobilellm.train.state.file_sha256"
WRITE = "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data"
FAILURES: dict[str, Callable[[], Patch]] = {
    "killed in a step": lambda: _at_call(STEP, 8, _killed),
    "killed while saving": lambda: _at_call(SAVE, 2, _killed),
    "killed while evaluating": lambda: _at_call(EVALUATION, 2, _killed),
    "bad shard": lambda: _at_call(BATCH, 8, _unreadable),
    "disk full of tensors": lambda: _at_call(WRITE, 2, _full),
    "disk full at the end": lambda: _at_call(SAVE, 2, _full),
    "not a number": lambda: _spoilt(2 * 8),
    "asked to stop": lambda: _at_call(STEP, 8, _asked),
}


def launch(
    size: int, folder: Path, commands: Sequence[tuple[str, Sequence[str]]], ports: Sequence[int]
) -> list[tuple[Ended, list[Ended]]]:
    """`commands` with the failure of each, one after the other; of every process its own end and theirs."""
    (folder / "commands.json").write_text(
        json.dumps([(*each, p) for each, p in zip(commands, ports, strict=True)])
    )
    ended = run_processes(__file__, size, folder, {}, 300)
    found = []
    for rank, each in enumerate(ended):
        file = folder / f"{rank}.json"
        found.append(
            (each, [Ended(*seen) for seen in json.loads(file.read_text())] if file.is_file() else [])
        )
        file.unlink(missing_ok=True)
    return found


def _main(folder: Path) -> None:
    import torch

    from mobilellm.cli.main import _main as command

    torch.set_num_threads(1)
    os.chdir(folder)
    seen, rank = [], int(os.environ["RANK"])
    fails = rank == WHO and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for failure, arguments, *port in json.loads((folder / "commands.json").read_text()):
        if port:  # torchrun has told its own
            os.environ["MASTER_PORT"] = f"{port[0]}"
        patch = FAILURES[failure]() if fails else contextlib.nullcontext()
        with contextlib.redirect_stderr(io.StringIO()) as said, patch:
            code = command(arguments)
        seen.append((code, said.getvalue()))
        (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
