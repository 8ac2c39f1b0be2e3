"""The training loop. Everything that differs between kinds of run is handed in."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from mobilellm.model.transformer import MobileLLM
from mobilellm.train import lean
from mobilellm.train.checkpoint_files import RunState, checkpoints, drop_old, only_run
from mobilellm.train.distributed import LossFunction, Spread, World, is_sharded, whole_model
from mobilellm.train.feed import Fed, Feed, Loader
from mobilellm.train.guard import Guard, TrainingError
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import MetricsLog, Record
from mobilellm.train.optim import KernelAdamW, build_optimizer
from mobilellm.train.schedule import learning_rate_factor
from mobilellm.train.settings import TrainSettings
from mobilellm.train.state import Checkpointer, load_state
from mobilellm.train.stop_requests import stop_requests

Evaluator = Callable[[MobileLLM, int], Mapping[str, float]]
Speaker = Callable[[MobileLLM, int], Sequence[tuple[str, str]]]
Passes = Callable[[int], contextlib.AbstractContextManager[None]]
"""Steps done -> what the passes of the next one run in: within, the model may compute with other weights."""
Stopped = Literal["interrupt", "requeue"]


KINDS = ("lora", "qat")
"""Tables of a recipe that say what is trained, and how: a run that goes on must have the same."""


class Outcome(NamedTuple):
    """Steps done, and what asked to stop before the last: a person (SIGINT) or a scheduler."""

    steps: int
    stopped: Stopped | None


def train(
    model: MobileLLM,
    loader: Loader,
    settings: TrainSettings,
    directory: Path,
    evaluate: Evaluator | None = None,
    on_record: Callable[[Record], None] | None = None,
    loss_function: LossFunction = weighted_loss,
    world: World | None = None,
    speak: Speaker | None = None,
    on_stop: Callable[[], None] | None = None,
    passes: Passes | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Outcome:
    """Train `model` in place up to `settings.steps`, going on from the newest checkpoint in `directory`.

    `on_start` is told once the steps that are done: nothing of what was found refuses the run any more.
    SIGINT, SIGTERM and SIGUSR1 stop it after a step, with a checkpoint; `on_stop` is called as soon as one
    comes, in the signal's handler. Metrics go to `directory/metrics.jsonl` and, a record at a time, to
    `on_record`: every step's loss (nats a token, the z-loss included), learning rate, gradient norm, tokens,
    seconds, seconds spent waiting for data, peak memory; evaluations under "eval", what `speak` gives
    (prompts and completions) under "samples". In a world of several processes all call this alike, each with
    its own share of the data; only the first writes records, and only there is `speak` called.
    Quantisation-aware training is a matter of `passes`: gradients of the weights that the model has within
    change those it has outside.

    Raises TrainingError when the loss is no longer a number or jumps, ValueError for a checkpoint that is
    damaged or another run's, for settings that do not fit model or loader, and while another process trains
    in `directory`.
    """
    world = world or World(device=model.head_weight.device)
    settings.batch.check(model.config.max_position_embeddings, world.size)
    with (
        only_run(directory / "checkpoints", world),
        lean.gradients(model, settings, world),
        stop_requests(on_stop) as requests,
    ):
        run = _Run(model, loader, settings, directory, world, loss_function, requests)
        run.evaluate, run.speak, run.passes = evaluate, speak, passes
        run.on_start, run.on_record = on_start, on_record
        return run()


class _Run:
    """One call of `train`."""

    evaluate: Evaluator | None
    speak: Speaker | None
    on_start: Callable[[int], None] | None
    on_record: Callable[[Record], None] | None
    passes: Passes | None

    def __init__(
        self,
        model: MobileLLM,
        loader: Loader,
        settings: TrainSettings,
        directory: Path,
        world: World,
        loss_function: LossFunction,
        requests: list[int],
    ) -> None:
        self.model, self.loader, self.settings, self.world = model, loader, settings, world
        self.metrics, self.folder = directory / "metrics.jsonl", directory / "checkpoints"
        self.requests = requests
        self.identity = run_identity(model, settings)
        self.spread = Spread(model, loss_function, world, settings.compute)
        kernels = lean.kernels(model, settings, world)
        self.optimizer = build_optimizer(model, settings.optim, kernels)  # after the model is spread
        self.checkpointer = Checkpointer(self.folder, settings.checkpoint, world)
        self.guard = Guard(settings.guard, directory, world.is_first)
        self.log: MetricsLog | None = None  # of the first process only
        self.done, self.saved = 0, -1  # steps
        self.position: dict[str, Any] = {}  # of the loader, to go on from

    def __call__(self) -> Outcome:
        settings = self.settings
        self._restore()
        if self.world.is_first:
            self.log = MetricsLog(self.metrics, self.saved)
        try:
            if self.on_start is not None:
                self.on_start(self.done)
            if self.saved < 0:
                self._evaluate()
            stopped = None
            with Feed(self.loader, self.world.device, self.model.config.vocab_size) as feed:
                while self.done < settings.steps:
                    fed = feed.next()
                    total, stopped = self._agree(fed.total_weight)
                    if stopped:
                        break
                    self._record(self._step(fed, total))
                    last = self.done == settings.steps
                    if last or self.done % settings.evaluate_every == 0:
                        self._evaluate()
                    if last or self.done % settings.checkpoint.every == 0:
                        self._save()
            if max(self.saved, 0) < self.done:
                self._save()
            self.checkpointer.wait()
        except BaseException as failure:
            self.checkpointer.join_after(failure)  # nobody must write there after it
            raise
        finally:
            if self.log is not None:
                self.log.close()
        return Outcome(self.done, stopped)

    def _restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        settings = self.settings.checkpoint
        # What the first process sees counts: on a network file system others may see it later.
        newest = self.world.gather(next(reversed(checkpoints(self.folder)), None))[0]
        if newest is not None:
            state = load_state(newest, self.model, self.optimizer, self.identity, self.world)
            self.loader.restore(state.loader)
            self.guard.restore(state.losses)
            self.done = self.saved = state.step
            if self.world.is_first:
                drop_old(self.folder, settings.keep_last, settings.milestone_every)
        self.position = self.loader.state()

    def _record(self, values: Record) -> None:
        if self.log is not None:
            self.log.write(values)
            if self.on_record is not None:
                self.on_record(values)

    def _evaluate(self) -> None:
        if self.evaluate is not None:
            numbers = {name: float(value) for name, value in self.evaluate(self.model, self.done).items()}
            self._record({"step": self.done, "eval": numbers})
        if self.speak is not None:
            sharded = self.world.is_spread and is_sharded(self.model)
            plain = whole_model(self.model) if sharded else self.model
            if plain is not None and self.world.is_first:
                said = [list(pair) for pair in self.speak(plain, self.done)]
                self._record({"step": self.done, "samples": said})

    def _save(self) -> None:
        if self.log is not None:
            self.log.sync()
        state = RunState(self.done, self.position, self.identity, self.guard.losses)
        self.checkpointer.save(state, self.model, self.optimizer)
        self.saved = self.done

    def _agree(self, weight: float) -> tuple[float, Stopped | None]:
        """The weight of the step's targets over all processes, and whether any was asked to stop."""
        total, interrupts, others = self.world.sum([weight, *self._asked()])
        return total, "interrupt" if interrupts else "requeue" if others else None

    def _asked(self) -> tuple[int, int]:
        """Whether this process was asked to stop, by a person or otherwise."""
        first = self.requests[0] if self.requests else None
        return int(first == signal.SIGINT), int(first not in (None, signal.SIGINT))

    def _step(self, fed: Fed, total: float) -> Record:
        """One optimiser step over all micro-batches; the record of it."""
        started = time.perf_counter()
        settings, step = self.settings, self.done + 1
        lr = settings.optim.lr * learning_rate_factor(self.done, settings.steps, settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._check_batch(fed, total, step)
        _seed(settings.seed, self.done, self.world.rank)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if self.passes is None else self.passes(self.done):
            loss = self._backward(fed, total)
        clip = self.optimizer.clip if isinstance(self.optimizer, KernelAdamW) else self.spread.clip
        norm = clip(settings.optim.clip_norm)
        (everywhere,) = self.world.sum([loss])
        self.guard.check(step, everywhere, norm, fed.address, settings.optim.lr)
        self.optimizer.step()
        self.done, self.position = step, fed.after
        return {
            "step": step,
            "tokens": step * settings.batch.tokens_per_step,
            "loss": everywhere,
            "learning_rate": lr,
            "gradient_norm": norm,
            "seconds": time.perf_counter() - started + fed.waited,
            "data_seconds": fed.waited,
            "peak_memory_bytes": peak_memory(self.world.device),
        }

    def _backward(self, fed: Fed, total: float) -> float:
        """Gradients of the whole step; this process's part of the loss."""
        compute = self.settings.compute
        parts = {"tokens": fed.tokens, "targets": fed.targets, "weights": fed.weights, **fed.options}
        micro = list(
            zip(*(torch.split(part, self.settings.batch.micro_batch) for part in parts.values()), strict=True)
        )
        loss = torch.zeros((), device=self.world.device)
        for number, (tokens, targets, weights, *rest) in enumerate(micro, 1):
            options: dict[str, Any] = dict(zip(fed.options, rest, strict=True))
            if compute.z_loss:
                options["z_loss"] = compute.z_loss
            if compute.activation_checkpointing:
                options["activation_checkpointing"] = True
            with torch.autocast(self.world.device.type, torch.bfloat16, compute.precision == "bfloat16"):
                batch = (tokens, targets, weights)
                loss += self.spread.backward(batch, total, number == len(micro), **options)
        return loss.item()

    def _check_batch(self, fed: Fed, total: float, step: int) -> None:
        batch, size = self.settings.batch, self.world.size
        expected = (batch.sequences_per_step // size, batch.sequence_length)
        if fed.tokens.shape != expected:
            raise ValueError(
                f"train: the loader gives batches of {tuple(fed.tokens.shape)}, the settings {expected}"
            )
        if not total > 0:
            raise TrainingError(
                f"step {step}: no target of the batch counts (weights sum to {total}; batch at "
                f"{fed.address}); leave such samples out of the data"
            )


def run_identity(model: MobileLLM, settings: TrainSettings) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption: architecture, optimisation, order."""
    free = {
        "evaluate_every", "checkpoint", "guard", "batch.micro_batch", "compute.compile", "compute.strategy",
        "compute.activation_checkpointing",
    }  # fmt: skip
    fixed: dict[str, Any] = {}
    for name, value in asdict(settings).items():
        of_the_loop = name in TrainSettings.__dataclass_fields__
        if value is None or not (of_the_loop or name in KINDS):  # a recipe's model, data and logging
            continue
        leaves = (
            {f"{name}.{leaf}": each for leaf, each in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        fixed |= {leaf: each for leaf, each in leaves.items() if leaf not in free and name not in free}
    if model.base_fingerprint is not None:
        fixed["base"] = model.base_fingerprint
    return model.config.to_dict() | fixed


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU, the most that was allocated; of a process on a CPU, the most it has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seed(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step follow from seed, step and rank: they need no place in a checkpoint."""
    torch.manual_seed(int(np.random.PCG64([seed, step, rank]).random_raw() >> 1))
