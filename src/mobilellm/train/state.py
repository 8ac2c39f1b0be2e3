"""Checkpoints of a run: everything needed to go on bit-exactly, each whole or not there.

step-00000100/shard-…-model-….safetensors   trained weights as model.NAME, the optimiser's tensors as
                                            optimizer.NAME.KEY, one file a process
step-00000100/state.json                    RunState, and the sha256 of every file and of itself

The tensors are written and read by torch.distributed.checkpoint, in safetensors: a run goes on with any
number of processes, sharded or not. Random numbers are not stored: those of a step follow from seed, step
and rank (`loop._seed`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from mobilellm.atomic import sync
from mobilellm.data.shards import file_sha256
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.checkpoint_files import (
    RunState,
    damage,
    damaged,
    difference,
    drop_old,
    read_state,
    strangers,
    write_state,
)
from mobilellm.train.distributed import ToldByAnother, World, reshard
from mobilellm.train.settings import CheckpointSettings

_FILE_BYTES = 2**28
"""About how large a file of a checkpoint gets; one is put together in memory at a time."""


class Checkpointer:
    """Writes the checkpoints of a run, one at a time; all processes of the world must call it alike."""

    def __init__(self, directory: Path, settings: CheckpointSettings, world: World) -> None:
        self._directory, self._settings, self._world = directory, settings, world
        if not world.is_spread:
            _no_warning_of_being_alone()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: RunState, model: MobileLLM, optimizer: torch.optim.Optimizer) -> None:
        """Write `directory/step-N` and drop old ones; with `asynchronous`, in the background from a copy.

        Raises OSError, e.g. for a full disk; an error in the background is raised by the next call.
        """
        self.wait()
        reshard(model)
        tensors = _tensors(model, optimizer)
        path = self._directory / f"step-{state.step:08d}"
        temporary = path.with_name(f"{path.name}.tmp")
        if self._world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._world.gather(None)  # the folder is there
        options: dict[str, Any] = {
            "storage_writer": HuggingFaceStorageWriter(
                str(temporary), _files(tensors), save_distributed=True
            ),
            "process_group": self._world.background,
            "no_dist": not self._world.is_spread,
        }
        if not self._settings.asynchronous:
            with _plain_errors(path, temporary):
                save(tensors, **options)
                self._publish(temporary, path, state)
            return
        copied = async_save(tensors, **options)  # returns when the copy is made

        def finish() -> None:
            try:
                with _plain_errors(path, temporary):
                    copied.result()  # type: ignore[union-attr]
                    self._publish(temporary, path, state)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=finish, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is there. Raises what went wrong with it."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Until nothing is being written any more, well or badly."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def join_after(self, failure: BaseException) -> None:
        """`join`, for a run that fails for another reason: what went wrong here is noted with it."""
        self.join()
        if self._error is not None:
            failure.add_note(f"the last checkpoint was not written, either ({self._error})")

    def _publish(self, temporary: Path, path: Path, state: RunState) -> None:
        """Hash and sync every file, write state.json, and give the folder its name."""
        world, sums, problem = self._world, dict[str, str](), None
        try:
            files = sorted(temporary.iterdir())[world.rank :: world.size]
            for file in files:
                sync(file)
            sums = {file.name: file_sha256(file) for file in files}
        except OSError as error:  # who fails removes the folder: not while others are still at work in it
            problem = error
        everywhere = world.gather((sums, problem))
        if problem is not None:
            raise problem
        if told := [str(found) for _, found in everywhere if found is not None]:
            raise ToldByAnother(told[0])
        if world.is_first:
            write_state(
                temporary, state, {name: value for each, _ in everywhere for name, value in each.items()}
            )
            if path.exists():  # the same step of a run that was resumed from before it
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.deleted")))
            os.rename(temporary, path)
            sync(path.parent)
            drop_old(self._directory, self._settings.keep_last, self._settings.milestone_every)
        world.gather(None)


def load_state(
    path: Path, model: MobileLLM, optimizer: torch.optim.Optimizer, identity: dict[str, Any], world: World
) -> RunState:
    """Restore weights and optimiser in place, whatever number of processes wrote them.

    Every file is compared with its sha256. Raises ValueError, before anything is changed, if the checkpoint
    is damaged or another run's.
    """
    state, sums = read_state(path)
    problem = difference(path, state, identity)
    if problem is None:
        found = damage(path, dict(sorted(sums.items())[world.rank :: world.size])) or strangers(path, sums)
        problem = str(damaged(path, found)) if found else None
    world.agree(problem)
    storage = HuggingFaceStorageReader(str(path))
    try:
        stored = storage.read_metadata().state_dict_metadata
        if problem := _mismatch(stored, model) or _stateless(stored, model, optimizer):
            raise ValueError(problem)
        targets = _targets(stored, model)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise damaged(path, " ".join(str(error).split())) from None
    load(
        targets,
        storage_reader=HuggingFaceStorageReader(str(path)),
        process_group=world.background,
        no_dist=not world.is_spread,
    )
    by_name = _trained(model)
    optimizer.state.clear()
    for key, value in targets.items():
        if key.startswith("optimizer."):
            name, _, part = key.removeprefix("optimizer.").rpartition(".")
            optimizer.state[by_name[name]][part] = value
    return state


def load_weights(path: Path, model: MobileLLM) -> None:
    """Only the weights of a checkpoint, into a plain model of its shape. Raises ValueError if damaged."""
    _, sums = read_state(path)
    if text := damage(path, sums) or strangers(path, sums):
        raise damaged(path, text)
    stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    if problem := _mismatch(stored, model):
        raise damaged(path, problem)
    targets = {f"model.{name}": parameter.detach() for name, parameter in _trained(model).items()}
    _no_warning_of_being_alone()
    load(targets, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _no_warning_of_being_alone() -> None:
    """One process is no accident."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _trained(model: MobileLLM) -> dict[str, nn.Parameter]:
    """What a run changes, by name: what is frozen is no part of a checkpoint. A tied weight is there once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(model: MobileLLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that is trained of the model, and the optimiser, by name, not copied."""
    tensors: dict[str, Any] = {}
    for name, parameter in _trained(model).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.detach()
    return tensors


def _files(tensors: Mapping[str, Any]) -> dict[str, int]:
    """The number, from 1, of the file each tensor goes to."""
    numbers, number, size = dict[str, int](), 1, 0
    for name, tensor in tensors.items():
        numbers[name] = number
        size += tensor.numel() * tensor.element_size()
        if size >= _FILE_BYTES:
            number, size = number + 1, 0
    last = max(numbers.values())
    return {name: min(number, last) for name, number in numbers.items()}


def _targets(stored: Mapping[str, Any], model: MobileLLM) -> dict[str, Any]:
    """Where to put what is stored: the parameters themselves, and new tensors like them for the optimiser."""
    parameters = {name: parameter.detach() for name, parameter in _trained(model).items()}
    targets: dict[str, Any] = {f"model.{name}": parameter for name, parameter in parameters.items()}
    for key, meta in stored.items():
        if key.startswith("optimizer."):
            name = key.removeprefix("optimizer.").rpartition(".")[0]
            parameter, dtype = parameters[name], meta.properties.dtype
            targets[key] = (
                torch.empty_like(parameter, dtype=dtype)
                if len(meta.size)
                else torch.empty((), dtype=dtype, device=parameter.device)
            )
    return targets


def _mismatch(stored: Mapping[str, Any], model: MobileLLM) -> str:
    """How the stored tensors differ from those of model and optimiser, or ""."""
    parameters = _trained(model)
    for name, parameter in parameters.items():
        meta = stored.get(f"model.{name}")
        if meta is None:
            return f"it lacks {name}"
        if tuple(meta.size) != tuple(parameter.shape) or meta.properties.dtype != parameter.dtype:
            return f"{name} is {tuple(meta.size)} {meta.properties.dtype}, not {tuple(parameter.shape)}"
    for key, meta in stored.items():
        kind, _, rest = key.partition(".")
        name = rest if kind == "model" else rest.rpartition(".")[0]
        if kind not in ("model", "optimizer") or name not in parameters:
            return f"it holds {key}, which this run has not"
        if kind == "optimizer" and len(meta.size) and tuple(meta.size) != tuple(parameters[name].shape):
            return f"{key} is {tuple(meta.size)}, not {tuple(parameters[name].shape)}"
    return ""


def _stateless(stored: Mapping[str, Any], model: MobileLLM, optimizer: torch.optim.Optimizer) -> str:
    """The first parameter without what the optimiser keeps for all others of its group, or ""."""
    names = {parameter: name for name, parameter in _trained(model).items()}
    kept: dict[str, set[str]] = {name: set() for name in names.values()}
    for key in stored:
        if key.startswith("optimizer."):
            name, _, part = key.removeprefix("optimizer.").rpartition(".")
            kept[name].add(part)
    for group in optimizer.param_groups:
        inside = [names[parameter] for parameter in group["params"]]
        wanted = set().union(*(kept[name] for name in inside))
        for name in inside:
            if not kept[name] or kept[name] != wanted:
                return f"it lacks some of the optimiser's state of {name}"
    return ""


@contextlib.contextmanager
def _plain_errors(path: Path, temporary: Path) -> Iterator[None]:
    """The first cause of torch's collected errors; an OSError names the checkpoint, not a temporary file.

    What was written of it is removed: a full disk must not stay full of it.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # no interrupt: others may still be writing there then
        shutil.rmtree(temporary, ignore_errors=True)
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
