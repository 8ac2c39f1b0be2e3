"""Checkpoints of a run: everything needed to go on bit-exactly, each whole or not there.

step-00000100/shard-…-model-….safetensors   weights as model.NAME, the optimiser's tensors as
                                            optimizer.NAME.KEY, one file a process
step-00000100/state.json                    RunState, and the sha256 of every file

The tensors are written and read by torch.distributed.checkpoint, in safetensors: a run goes on with any
number of processes, sharded or not. Random numbers are not stored: those of a step follow from seed, step
and rank (`loop._seed`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from mobilellm.atomic import hold, sync
from mobilellm.data.shards import file_sha256
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.distributed import World, reshard
from mobilellm.train.settings import CheckpointSettings

_NAME = re.compile(r"step-([0-9]+)")
_FILE_BYTES = 2**28
"""About how large a file of a checkpoint gets; one is put together in memory at a time."""
_REMAINS = re.compile(r"step-[0-9]+\.(tmp|deleted)")


class RunState(NamedTuple):
    step: int  # steps done
    loader: dict[str, Any]
    identity: dict[str, Any]  # of the recipe: a checkpoint of another run is refused


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first (an unfinished one still has its temporary name)."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def drop_old(directory: Path, keep_last: int, milestone_every: int = 0) -> None:
    """Delete all checkpoints but the newest `keep_last` and those of steps divisible by `milestone_every`."""
    for old in checkpoints(directory)[:-keep_last]:
        if not (milestone_every and int(old.name.removeprefix("step-")) % milestone_every == 0):
            # A kill while the files go must not leave what looks like a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.deleted")))


class Checkpointer:
    """Writes the checkpoints of a run, one at a time; all processes of the world must call it alike."""

    def __init__(self, directory: Path, settings: CheckpointSettings, world: World) -> None:
        self._directory, self._settings, self._world = directory, settings, world
        if world.size == 1:
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
            "no_dist": self._world.size == 1,
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

    def _publish(self, temporary: Path, path: Path, state: RunState) -> None:
        """Hash and sync every file, write state.json, and give the folder its name."""
        world = self._world
        files = sorted(temporary.iterdir())[world.rank :: world.size]
        for file in files:
            sync(file)
        sums = {file.name: file_sha256(file) for file in files}
        every = world.gather(sums)
        if world.is_first:
            record = state._asdict() | {
                "files": {name: value for each in every for name, value in each.items()}
            }
            with (temporary / "state.json").open("w", encoding="utf-8") as stream:
                stream.write(json.dumps(record, indent=2) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            sync(temporary)
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
    state, sums = _read_json(path / "state.json")
    problem = _difference(path, state, identity)
    if problem is None:
        found = _damage(path, dict(sorted(sums.items())[world.rank :: world.size])) or _strangers(path, sums)
        problem = str(_damaged(path, found)) if found else None
    world.agree(problem)
    storage = HuggingFaceStorageReader(str(path))
    try:
        stored = storage.read_metadata().state_dict_metadata
        if problem := _mismatch(stored, model) or _stateless(stored, model, optimizer):
            raise ValueError(problem)
        targets = _targets(stored, model)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    load(
        targets,
        storage_reader=HuggingFaceStorageReader(str(path)),
        process_group=world.background,
        no_dist=world.size == 1,
    )
    by_name = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in targets.items():
        if key.startswith("optimizer."):
            name, _, part = key.removeprefix("optimizer.").rpartition(".")
            optimizer.state[by_name[name]][part] = value
    return state


def load_weights(path: Path, model: MobileLLM) -> None:
    """Only the weights of a checkpoint, into a plain model of its shape. Raises ValueError if damaged."""
    _, sums = _read_json(path / "state.json")
    if text := _damage(path, sums) or _strangers(path, sums):
        raise _damaged(path, text)
    stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    if problem := _mismatch(stored, model):
        raise _damaged(path, problem)
    targets = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    _no_warning_of_being_alone()
    load(targets, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


@contextlib.contextmanager
def only_run(directory: Path, world: World) -> Iterator[None]:
    """Hold the folder of a run for this world, and clear what a killed one left half done.

    Raises ValueError while another process holds it.
    """
    if not world.is_first:
        world.agree(None)
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    problem = None
    with contextlib.ExitStack() as stack:
        busy = f"{directory}: another process is training there; wait for it or use another folder"
        try:
            stack.enter_context(hold(directory, busy))
        except ValueError as error:  # all are to hear of it
            problem = str(error)
        if problem is None:
            for path in directory.iterdir():
                if _REMAINS.fullmatch(path.name):
                    shutil.rmtree(path)
        world.agree(problem)
        yield


def _no_warning_of_being_alone() -> None:
    """One process is no accident."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _tensors(model: MobileLLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of model and optimiser by name, not copied. A tied weight is there once."""
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
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
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
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
    parameters = dict(model.named_parameters())
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
    names = {parameter: name for name, parameter in model.named_parameters()}
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


def _read_json(file: Path) -> tuple[RunState, dict[str, str]]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        sums = values.pop("files")
        state = RunState(**values)
        for field, kind in (("step", int), ("loader", dict), ("identity", dict)):
            if type(getattr(state, field)) is not kind:
                raise ValueError(f"{field} in {file.name} must be {kind.__name__}")
        if type(sums) is not dict or not sums or any(Path(name).name != name for name in sums):
            raise ValueError(f"files in {file.name} must name the files beside it")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise _damaged(file.parent, " ".join(str(error).split()) or type(error).__name__) from None
    return state, sums


def _difference(path: Path, state: RunState, identity: dict[str, Any]) -> str | None:
    ours = json.loads(json.dumps(identity))
    differences = [
        f"{name} = {state.identity.get(name)!r}, not {ours.get(name)!r}"
        for name in sorted(ours.keys() | state.identity.keys())
        if ours.get(name) != state.identity.get(name)
    ]
    if not differences:
        return None
    return (
        f"{path}: belongs to a run with other settings ({'; '.join(differences)}); "
        "use another folder or the same settings"
    )


def _damage(path: Path, sums: Mapping[str, Any]) -> str:
    for name, wanted in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_sha256(path / name) != wanted:
            return f"{name} is not what was written (its sha256 differs)"
    return ""


def _strangers(path: Path, sums: Mapping[str, Any]) -> str:
    """The reader takes whatever ends so: a file that was not written here must not be read with the rest."""
    names = [file.name for file in path.glob("*.safetensors") if file.name not in sums]
    return f"it holds {', '.join(sorted(names))}, which was not written with it" if names else ""


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: damaged checkpoint ({reason}); delete it to resume from the one before")


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
