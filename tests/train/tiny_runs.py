"""Training runs of a fraction of a second, here or in a process that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.data.loader import PackedLoader
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.checkpoint_files import checkpoints, step_of
from mobilellm.train.loop import Stopped, train
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import Record, read_metrics
from mobilellm.train.settings import TrainSettings

LS = preset("test-ls")
ORDINARY = preset("test")


class Run(NamedTuple):
    done: int
    stopped: Stopped | None
    model: MobileLLM
    records: list[Record]  # as handed to on_record

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if "loss" in record]


_TINY: dict[str, Any] = {
    "steps": 10,
    "seed": 5,
    "evaluate_every": 4,
    "batch.tokens_per_step": 64,
    "batch.sequence_length": 16,
    "batch.micro_batch": 4,
    "optim.lr": 1e-2,
    "schedule.warmup_steps": 2,
    "compute.precision": "float32",
    "checkpoint.every": 3,
}


def leaves(kind: type) -> list[str]:
    """Dotted names of all fields of a dataclass that are no dataclasses themselves, or may be one."""
    names = []
    for name, inner in get_type_hints(kind).items():
        if name in {field.name for field in fields(kind)}:
            table = table_of(inner)
            names += [name] if table is None else [f"{name}.{leaf}" for leaf in leaves(table)]
    return names


def table_of(kind: Any) -> Any:
    """The dataclass that a field's type is, or is beside None."""
    return next((each for each in (kind, *get_args(kind)) if is_dataclass(each)), None)


def tiny_settings(**changes: Any) -> TrainSettings:
    """Leaves by their dotted names, or by the last part where no other leaf has it: lr, not name."""
    known = leaves(TrainSettings)
    values = dict(_TINY)
    for name, value in changes.items():
        (full,) = [leaf for leaf in known if leaf == name or leaf.endswith(f".{name}")]
        values[full] = value
    return build(TrainSettings, values)


def build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of a nested dataclass from its leaves."""
    arguments: dict[str, Any] = {}
    for field in fields(kind):
        name, inner = f"{prefix}{field.name}", get_type_hints(kind)[field.name]
        if (table := table_of(inner)) is not None:
            if table is inner or any(leaf.startswith(f"{name}.") for leaf in values):
                arguments[field.name] = build(table, values, f"{name}.")
        elif name in values:
            arguments[field.name] = values[name]
    return kind(**arguments)


def tiny_stream(length: int = 600, vocab_size: int = LS.vocab_size) -> NDArray[np.uint16]:
    """Tokens that follow each other by a rule three times of four: there is something to learn."""
    noise = np.random.PCG64(11).random_raw(length)
    tokens = [7]
    for number in noise[1:]:
        tokens.append(int(number >> 8) % vocab_size if number % 4 == 0 else (5 * tokens[-1] + 3) % vocab_size)
    return np.array(tokens, dtype=np.uint16)


def tiny_model(config: ModelConfig = LS) -> MobileLLM:
    """Weights from numpy's raw bits, which are the same on every machine and in every version."""
    model = MobileLLM(config, torch.Generator())  # torch's own random state is left alone
    bits = np.random.PCG64(17)
    with torch.no_grad():
        for parameter in model.parameters():
            uniform = bits.random_raw(parameter.numel()).astype(np.float64) / 2**63 - 1  # in -1 … 1
            values = torch.from_numpy(uniform.astype(np.float32)).view_as(parameter)
            parameter.copy_(1 + values / 5 if parameter.ndim == 1 else values / 10)
    return model


def tiny_loader(settings: TrainSettings) -> PackedLoader:
    batch = settings.batch
    return PackedLoader(tiny_stream(), batch.sequence_length, batch.sequences_per_step, settings.seed)


def tiny_run(
    directory: Path,
    settings: TrainSettings | None = None,
    config: ModelConfig = LS,
    on_record: Callable[[Record], None] | None = None,
    **arguments: Any,
) -> Run:
    """Train afresh or go on in `directory`; `arguments` are those of `train`."""
    settings = settings or tiny_settings()
    model, records = tiny_model(config), list[Record]()

    def seen(record: Record) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    done, stopped = train(model, tiny_loader(settings), settings, directory, on_record=seen, **arguments)
    return Run(done, stopped, model, records)


def dropping_loss(
    model: MobileLLM, tokens: Tensor, targets: Tensor, weights: Tensor, **options: Any
) -> Tensor:
    """Leaves out random targets: exact only if every step draws the same numbers again."""
    return weighted_loss(model, tokens, targets, weights * (torch.rand(weights.shape) < 0.7), **options)


def an_evaluation(model: MobileLLM, step: int) -> dict[str, float]:
    with torch.no_grad():
        return {"loss": model(torch.arange(20)[None]).logsumexp(-1).mean().item(), "step": step}


def stop_at(step: int, number: int = signal.SIGTERM) -> Callable[[Record], None]:
    """For `on_record`: ask this process to stop when the step is done."""

    def ask(record: Record) -> None:
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), number)

    return ask


def same_weights(a: MobileLLM, b: MobileLLM) -> bool:
    """Bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def timeless(records: list[Record]) -> list[Record]:
    """Records without what differs from run to run."""
    differing = {"seconds", "data_seconds", "peak_memory_bytes"}
    return [{name: value for name, value in record.items() if name not in differing} for record in records]


# In a process that can be killed: `Runner` talks to the loop at the end of this file


KILLED = tiny_settings(steps=10, every=2, evaluate_every=5)


def killed_run(directory: Path, wait_at: int = -1, asynchronous: bool = False) -> int:
    """The run that is killed; with all that must be restored to go on exactly.

    After step `wait_at` it waits until a file "go" appears beside its directory.
    """

    def wait(record: Record) -> None:
        while record["step"] == wait_at and not directory.with_name("go").exists():
            time.sleep(0.002)

    settings = replace(KILLED, checkpoint=replace(KILLED.checkpoint, asynchronous=asynchronous))
    run = tiny_run(directory, settings, evaluate=an_evaluation, loss_function=dropping_loss, on_record=wait)
    return run.done


class Runner:
    """Starts `killed_run` in children of one process that has imported torch, hence quickly."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, directory: Path, **options: Any) -> int:
        """The pid of a child that trains in `directory`. It stays valid until `finish`, which must follow."""
        return int(self._ask({"directory": str(directory), **options}))

    def finish(self) -> tuple[int, str]:
        """Wait for the child: its exit code (minus the signal that killed it) and what it said."""
        code, text = self._ask("finish")
        return code, text

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(self, directory: Path, **options: Any) -> tuple[int, str]:
        self.start(directory, **options)
        return self.finish()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=300)


def wait_for_step(directory: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            records = read_metrics(directory / "metrics.jsonl")
            if records and records[-1]["step"] >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"no step {step} in {directory} within a minute")


def half_written(directory: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process was killed."""
    return any((directory / "checkpoints").glob("step-*.tmp"))


def newest_step(directory: Path) -> int:
    found = checkpoints(directory / "checkpoints")
    return step_of(found[-1]) if found else 0


def _kill_at_file_event(directory: Path, count: int) -> None:
    """Kill this process before the count-th time it opens, renames or removes something of the run."""
    left = count

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        name = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        # shutil.rmtree names what it removes from inside the folder it is in.
        if name.startswith(str(directory)) or (event in ("os.remove", "os.rmdir") and "/" not in name):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _child(options: dict[str, Any]) -> str:
    directory = Path(options["directory"])
    if "kill_at" in options:
        _kill_at_file_event(directory, options["kill_at"])
    if "file_size" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_size"], options["file_size"]))
    if "ignore" in options:
        signal.signal(options["ignore"], signal.SIG_IGN)
    try:
        done = killed_run(directory, options.get("wait_at", -1), options.get("asynchronous", False))
        return f"done {done}"
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def _serve() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        killed_run(Path(directory) / "run")  # torch imports the rest of itself at the first step
    for request in iter(sys.stdin.readline, ""):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os._exit(_answer(json.loads(request), write))
        os.close(write)
        print(pid, flush=True)
        sys.stdin.readline()  # the pid must not be given to another process before
        with os.fdopen(read) as pipe:
            text = pipe.read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text]), flush=True)


def _answer(options: dict[str, Any], write: int) -> int:
    """The child's life; its exit code."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        text = _child(options)
        os.write(write, text.encode())
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is for pytest
    _serve()
