"""Training in several processes, started by `launch`: every process runs this file and writes what it saw."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gloo_processes import run_spread
from tiny_runs import LS, ORDINARY, tiny_model, tiny_settings, tiny_stream
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.data.loader import Batch, PackedLoader
from mobilellm.eval.perplexity import Perplexity, windowed
from mobilellm.model.transformer import MobileLLM
from mobilellm.train import distributed
from mobilellm.train.checkpoint_files import checkpoints
from mobilellm.train.distributed import World, is_sharded, join, whole_model
from mobilellm.train.loop import train
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import Record
from mobilellm.train.settings import TrainSettings

CONFIGS: dict[str, ModelConfig] = {"shared": LS, "untied": replace(ORDINARY, tie_word_embeddings=False)}
OTHERWISE: dict[str, dict[str, Any]] = {
    "ddp bfloat16": {"precision": "bfloat16"},
    "fsdp bfloat16": {"precision": "bfloat16", "strategy": "fsdp"},
    "fsdp in half": {"precision": "bfloat16", "strategy": "fsdp", "half": True},
    "fsdp in half again": {
        "precision": "bfloat16",
        "strategy": "fsdp",
        "half": True,
        "activation_checkpointing": True,
    },
    "ddp muon": {"optim.name": "muon"},
}
"""Arithmetic that rounds more: compared less closely. In `half` weights are exchanged in bfloat16, as on GPUs."""
TARGETS = 99
"""Of the evaluation: no multiple of window, batch or ranks."""


def spread_settings(**changes: Any) -> TrainSettings:
    """16 sequences a step, two at a time: several micro-batches on each of four processes.

    With the published learning rate: a larger one makes rounding grow from step to step.
    """
    values: dict[str, Any] = {
        "steps": 6, "tokens_per_step": 256, "micro_batch": 2, "every": 2, "evaluate_every": 2, "keep_last": 5,
        "lr": 2e-3,
    }  # fmt: skip
    return tiny_settings(**(values | changes))


class UnequalLoader(PackedLoader):
    """Weights that follow from the tokens, so that devices get unequal shares and some rows nothing."""

    def next(self) -> Batch:
        tokens, targets, weights, *_ = super().next()
        rows = (tokens[:, :1] % 4).astype(np.float32)
        return Batch(tokens, targets, weights * rows * (tokens % 3).astype(np.float32))


def spread_run(
    directory: Path,
    world: World,
    config: str = "shared",
    loss_function: Callable[..., Tensor] = weighted_loss,
    speaking: bool = True,
    half: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """What this process sees of a run, to compare with what another number of them sees."""
    gathers = mock.patch.object(distributed, "gathers_in_half", lambda world, compute: world.size > 1)
    settings, model, records = spread_settings(**changes), tiny_model(CONFIGS[config]), list[Record]()
    batch = settings.batch
    loader = UnequalLoader(
        tiny_stream(4000),
        batch.sequence_length,
        batch.sequences_per_step,
        settings.seed,
        world.rank,
        world.size,
    )

    def evaluate(model: MobileLLM, step: int) -> dict[str, float]:
        stream = tiny_stream(TARGETS + 1)
        mine = windowed(model, stream, 16, batch=2, rank=world.rank, world_size=world.size)
        nats, tokens = world.sum(mine)
        return {"loss": Perplexity(nats, int(tokens)).loss, "tokens": tokens}

    def speak(model: MobileLLM, step: int) -> list[tuple[str, str]]:
        with torch.no_grad():
            return [("sum", str(model(torch.arange(9)[None]).logsumexp(-1).sum().item()))]

    with gathers if half else contextlib.nullcontext():
        outcome = train(
            model,
            loader,
            settings,
            directory,
            evaluate,
            records.append,
            loss_function,
            world,
            speak if speaking else None,
        )
    sharded = world.size > 1 and is_sharded(model)
    plain = whole_model(model) if sharded else model
    if plain is not None and world.is_first:
        torch.save(plain.state_dict(), directory / "weights.pt")
    return {
        **outcome._asdict(),
        "loss": [record["loss"] for record in records if "loss" in record],
        "norm": [record["gradient_norm"] for record in records if "loss" in record],
        "eval": [record["eval"]["loss"] for record in records if "eval" in record],
        "evaluated": [record["eval"]["tokens"] for record in records if "eval" in record],
        "said": [float(record["samples"][0][1]) for record in records if "samples" in record],
        "parameters": sum(
            (parameter.to_local() if sharded else parameter).numel() for parameter in model.parameters()
        ),
    }


def stopping_at(step: int, number: int = signal.SIGTERM) -> Callable[..., Tensor]:
    """A loss that asks its own process alone to stop, in the middle of a step."""
    calls = 0
    per_step = 8 // int(os.environ.get("WORLD_SIZE", "1"))  # micro-batches

    def loss(model: MobileLLM, *batch: Tensor, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == per_step * (step - 1) + 1:
            os.kill(os.getpid(), number)
        return weighted_loss(model, *batch, **options)

    return loss


def spoilt_at(step: int) -> Callable[..., Tensor]:
    calls = 0
    per_step = 8 // int(os.environ.get("WORLD_SIZE", "1"))

    def loss(model: MobileLLM, *batch: Tensor, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return weighted_loss(model, *batch, **options) * (float("nan") if calls == per_step * step else 1.0)

    return loss


def _complaint(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _everything(folder: Path, world: World) -> dict[str, Any]:
    """All that `test_distributed.py` looks at, in one start of the processes."""
    last = world.rank == world.size - 1
    seen: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        for config in CONFIGS:
            name = f"{strategy} {config}"
            seen[name] = spread_run(folder / name, world, config, strategy=strategy)
    for name, changes in OTHERWISE.items():
        seen[name] = spread_run(folder / name, world, **changes)
    # Started by one process before us; one of us alone is asked to stop.
    ask = {"loss_function": stopping_at(2)} if last else {}
    seen["1 to many"] = spread_run(folder / "1 to many", world, **ask)
    seen["1 to fsdp"] = spread_run(
        folder / "1 to fsdp", world, speaking=False, strategy="fsdp", asynchronous=True
    )
    # From DDP to FSDP, in the background; the rest is for one process after us.
    ask = {"loss_function": stopping_at(1, signal.SIGUSR1)} if last else {}
    seen["ddp first"] = spread_run(folder / "mixed", world, asynchronous=True, **ask)
    ask = {"loss_function": stopping_at(3, signal.SIGINT)} if last else {}
    seen["fsdp then"] = spread_run(folder / "mixed", world, asynchronous=True, strategy="fsdp", **ask)
    ask = {"loss_function": spoilt_at(3)} if last else {}
    seen["spoilt"] = _complaint(lambda: spread_run(folder / "spoilt", world, **ask))
    world.gather(None)
    if world.is_first:
        file = sorted(checkpoints(folder / "ddp shared" / "checkpoints")[-1].glob("*.safetensors"))[-1]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    world.gather(None)
    seen["damaged"] = _complaint(lambda: spread_run(folder / "ddp shared", world, steps=6))
    seen["too many"] = _complaint(
        lambda: spread_run(folder / "new", world, tokens_per_step=16 * (world.size + 1))
    )
    return seen


def launch(size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `size` processes saw, by rank; all files are in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_spread(__file__, size, folder, {"MASTER_PORT": f"{port}"}, 180)


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    with join("cpu") as world:
        seen = _everything(folder, world)
    (folder / f"{world.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
