"""The training loop. Everything that differs between kinds of run is handed in."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from mobilellm.data.loader import Batch
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import MetricsLog, Record
from mobilellm.train.optim import build_optimizer
from mobilellm.train.schedule import cosine
from mobilellm.train.settings import TrainSettings
from mobilellm.train.state import RunState, checkpoints, drop_old, load_state, only_run, save_state

Evaluator = Callable[[MobileLLM, int], Mapping[str, float]]
Loss = Callable[[MobileLLM, Tensor, Tensor, Tensor], Tensor]


class Loader(Protocol):
    def next(self) -> Batch: ...
    def state(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, int]) -> None: ...


class TrainingError(ValueError):
    """Training cannot go on; the message says where and what to try."""


def train(
    model: MobileLLM,
    loader: Loader,
    settings: TrainSettings,
    directory: Path,
    evaluate: Evaluator | None = None,
    on_record: Callable[[Record], None] | None = None,
    loss_function: Loss = weighted_loss,
    on_stop: Callable[[], None] | None = None,
) -> int:
    """Train `model` in place up to `settings.steps`, going on from the newest checkpoint in `directory`.

    Returns the number of steps done: fewer than `settings.steps` when SIGINT or SIGTERM asked to stop, after
    a checkpoint was written. `on_stop` is called as soon as one does, in the signal's handler. Metrics go to
    `directory/metrics.jsonl` and, a record at a time, to `on_record`: every step's loss (nats a token),
    learning rate, gradient norm, tokens and seconds; evaluations under "eval". Raises TrainingError when the
    loss is no longer a number, ValueError for a checkpoint that is damaged or another run's, for settings
    that do not fit model or loader, and while another process trains in `directory`.
    """
    context = model.config.max_position_embeddings
    if settings.sequence_length > context:
        raise ValueError(
            f"train: sequence_length = {settings.sequence_length} is longer than the model's context of "
            f"{context} (max_position_embeddings)"
        )
    with only_run(directory / "checkpoints"), _stop_requests(on_stop) as stop_requested:
        return _train(model, loader, settings, directory, evaluate, on_record, loss_function, stop_requested)


def _train(
    model: MobileLLM,
    loader: Loader,
    settings: TrainSettings,
    directory: Path,
    evaluate: Evaluator | None,
    on_record: Callable[[Record], None] | None,
    loss_function: Loss,
    stop_requested: Callable[[], bool],
) -> int:
    optimizer = build_optimizer(model, settings)
    folder, identity = directory / "checkpoints", run_identity(model, settings)
    existing = checkpoints(folder)
    done = saved = 0
    torch.manual_seed(settings.seed)
    if existing:
        state = load_state(existing[-1], model, optimizer, identity)
        loader.restore(state.loader)
        done = saved = state.step
        drop_old(folder, settings.keep_checkpoints)
    log = MetricsLog(directory / "metrics.jsonl", done if existing else -1)

    def record(values: Record) -> None:
        log.write(values)
        if on_record is not None:
            on_record(values)

    def evaluation() -> None:
        if evaluate is not None:
            numbers = {name: float(value) for name, value in evaluate(model, done).items()}
            record({"step": done, "eval": numbers})

    def save() -> None:
        log.sync()
        state = RunState(done, loader.state(), identity)
        save_state(folder, state, model, optimizer, settings.keep_checkpoints)

    try:
        if not existing:
            evaluation()
        while done < settings.steps and not stop_requested():
            values = _step(model, optimizer, loader, settings, done, loss_function)
            done += 1
            record(values)
            last = done == settings.steps
            if last or done % settings.evaluate_every == 0:
                evaluation()
            if last or done % settings.checkpoint_every == 0:
                save()
                saved = done
        if saved < done:
            save()
    finally:
        log.close()
    return done


def run_identity(model: MobileLLM, settings: TrainSettings) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption: architecture, optimisation, order."""
    cadence = {"evaluate_every", "checkpoint_every", "keep_checkpoints", "micro_batch"}
    fixed = {name: value for name, value in asdict(settings).items() if name not in cadence}
    return model.config.to_dict() | fixed


def _step(
    model: MobileLLM,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    settings: TrainSettings,
    index: int,
    loss_function: Loss,
) -> Record:
    """One optimiser step over all micro-batches; the record of it."""
    started = time.perf_counter()
    device = model.head_weight.device
    factor = cosine(index, settings.steps, settings.warmup_steps, settings.final_fraction)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    address = loader.state()
    batch = [torch.from_numpy(array).to(device) for array in loader.next()]
    expected = (settings.sequences_per_step, settings.sequence_length)
    if batch[0].shape != expected:
        raise ValueError(
            f"train: the loader gives batches of {tuple(batch[0].shape)}, the settings {expected}"
        )
    total_weight = batch[2].sum()
    if not total_weight.item() > 0:
        raise TrainingError(
            f"step {index + 1}: no target of the batch counts (weights sum to {total_weight.item()}; batch "
            f"at {address}); leave such samples out of the data"
        )
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for tokens, targets, weights in zip(
        *(torch.split(part, settings.micro_batch) for part in batch), strict=True
    ):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            part = loss_function(model, tokens, targets, weights) / total_weight
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise TrainingError(
            f"step {index + 1}: loss {loss.item()} and gradient norm {norm.item()} are not both finite "
            f"(batch at {address}); train in a fresh folder with a learning_rate below "
            f"{settings.learning_rate}; the checkpoints before it are kept"
        )
    optimizer.step()
    return {
        "step": index + 1,
        "tokens": (index + 1) * settings.tokens_per_step,
        "loss": loss.item(),
        "learning_rate": settings.learning_rate * factor,
        "gradient_norm": norm.item(),
        "seconds": time.perf_counter() - started,
    }


@contextlib.contextmanager
def _stop_requests(on_stop: Callable[[], None] | None = None) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop after this step; a second one interrupts.

    A signal that the process was started to ignore (a job in the background, nohup) stays ignored.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None stands for a handler that was not set from Python and cannot be put back.
    previous = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        if on_stop is not None:
            on_stop()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    except Exception:
        if len(received) > 1:  # native code turns an interrupt into an error of its own, e.g. of damaged data
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
