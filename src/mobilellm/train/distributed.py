"""One process or many: who we are, sums over all, and the model spread over devices by torch's own engines.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or by Slurm's srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS,
SLURM_LOCALID; MASTER_ADDR and MASTER_PORT set by the job script), on GPUs with NCCL, on CPUs with gloo.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from mobilellm.model.transformer import MobileLLM
from mobilellm.train.settings import ComputeSettings

_OF_NCCL_ITSELF = re.compile("nccl(InvalidUsage|InvalidArgument|UnhandledCudaError|InternalError)")
"""What NCCL says where no other process is at fault: two on one GPU, say."""
LossFunction = Callable[..., Tensor]
"""(model, tokens, targets, weights, segments=…) -> sum of weight * nats, a scalar."""


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone, every sum is what it was."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None  # a gloo group for small sums on the CPU, which wait for no GPU
    background: Any = None  # another for checkpoints, which are written beside the training

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_spread(self) -> bool:
        """Whether torch's engines hold the model: in several processes, or in one that was given groups."""
        return self.size > 1 or self.control is not None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self.control)
        return [float(value) for value in totals.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank. For checkpoints: over the background group."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.background)
        return values

    def agree(self, problem: str | None) -> None:
        """Raise ValueError on every process if any has a problem: none is left waiting for the others."""
        problems = [text for text in self.gather(problem) if text is not None]
        if problems:
            raise ValueError(problems[0])


class ToldByAnother(ConnectionError):  # noqa: N818
    """What ends this process ends others, too, and one of them says it: this one need not."""


@contextlib.contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Join the processes of this run, if the environment tells of any, and leave them at the end.

    `device` is "cpu" or "cuda"; by default a GPU where there is one. Raises ValueError for half a
    description of the processes, or more of them on this machine than it has GPUs. What is raised inside is
    left to one of the processes that raise the same; the others raise ToldByAnother, as do those that wait in
    vain for one that failed. Raises ConnectionError where none could tell, because it was killed.
    """
    rank, size, local = _environment()
    place = named_device(device)
    if place.type == "cuda":
        if ":" not in str(place):
            if torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
                local = 0  # the one that --gpus-per-task shows to this task
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of this machine finds no GPU for it (of {torch.cuda.device_count()}); "
                    "start fewer processes"
                )
            place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if size == 1:
        yield World(device=place)
        return
    store, rank, size = next(rendezvous("env://", rank, size))
    store = part_of_this_start(store, rank, size)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, place, dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
    except BaseException as error:
        another = _instead(error, store, rank, size)
        if another is None:
            raise
        raise another from error
    finally:
        dist.destroy_process_group()


def part_of_this_start(store: Any, rank: int, size: int) -> Any:
    """The store below a name that the first process chooses; all of a start must call it.

    Processes that torchrun starts again get the store of those before, whose addresses are still in it. Its
    count of restarts is no name, for it differs between machines: those for the sake of another one are not
    counted. So each asks by a word that nobody has used before, and the first answers all whose words it
    finds, until those of this start have heard. Raises ConnectionError where they do not come.
    """
    mine = secrets.token_hex(16)
    if rank > 0:
        store.set(f"asked by {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.add(f"{name} heard", 1)
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    answered: set[bytes] = set()
    until = time.monotonic() + store.timeout.total_seconds()
    while (missing := size - 1 - store.add(f"{mine} heard", 0)) > 0:
        if time.monotonic() > until:
            raise ConnectionError(f"{missing} of {size} processes have not come; start all of them again")
        asking = [key for key in (f"asked by {other}" for other in range(1, size)) if store.check([key])]
        for word in {store.get(key) for key in asking} - answered:
            store.set(f"answer to {word.decode()}", mine)
            answered.add(word)
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)  # type: ignore[attr-defined]


def _instead(error: BaseException, store: Any, rank: int, size: int) -> ConnectionError | None:
    """What this process is to raise instead of `error`, if it is not the one to tell of it.

    Who fails by itself leaves a mark before it goes, so that who then loses contact knows that it was told.
    """
    if isinstance(error, ToldByAnother):
        return None
    lost = isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
    lost = lost and _OF_NCCL_ITSELF.search(str(error)) is None
    text = f"{type(error).__name__}: {error}"
    key = "failed/lost" if lost else "failed/" + hashlib.sha256(text.encode()).hexdigest()
    told = False
    with contextlib.suppress(RuntimeError):  # the store may be gone with the first process
        told = store.add(key, 1) > 1 or (lost and store.add("failed/told", 0) > 0)
        if not lost:
            store.add("failed/told", 1)
    if told and isinstance(error, Exception):
        return ToldByAnother(text)
    if lost:
        return ConnectionError(
            f"process {rank} of {size} lost contact with another, which was killed or cannot be reached "
            f"({text.split('. ', maxsplit=1)[0]})"
        )
    error.add_note(f"so says process {rank} of {size}, on {socket.gethostname()}")
    return None


def named_device(kind: str | None = None) -> torch.device:
    """The device that `join` says, of a process alone. Raises ValueError for one that is not there.

    Without touching it: a context on the first GPU of every process would take its memory."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch("cpu|cuda(:[0-9]+)?", kind) is None:
        raise ValueError(f"device = {kind!r} cannot be trained on; choose cpu or cuda")
    if kind != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device = {kind!r} cannot be used (torch finds no GPU here); use cpu")
    return torch.device(kind)


def _environment() -> tuple[int, int, int]:
    """Rank, number of processes, rank on this machine."""
    for launcher, names in (
        ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        # Of the step, which has the tasks that srun started: a job's script and its shells are alone.
        ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")),
    ):
        values = [os.environ.get(name) for name in names]
        missing = [name for name, value in zip(names, values, strict=True) if not value]
        if launcher == "torchrun" and 0 < len(missing) < len(names):
            raise ValueError(
                f"the environment lacks {', '.join(missing)}; start several processes with torchrun"
            )
        if missing:
            continue
        rank, size, local = (int(value or 0) for value in values)
        unmet = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if size > 1 and unmet:
            raise ValueError(
                f"{launcher} started {size} processes, but {' and '.join(unmet)} does not say where they "
                "meet; export both before (docs/examples/pretrain.sbatch)"
            )
        return rank, size, local
    return 0, 1, 0


class _Loss(nn.Module):
    """The loss as a module: what DDP and torch.compile wrap is a `forward`."""

    def __init__(self, model: MobileLLM, loss: LossFunction) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor, **options: Any) -> Tensor:
        return self.loss(self.model, *batch, **options)


class Spread:
    """A model made ready to train on the devices of a world: gradients are sums over all of them."""

    def __init__(self, model: MobileLLM, loss: LossFunction, world: World, compute: ComputeSettings) -> None:
        self._sharded = world.is_spread and compute.strategy == "fsdp"
        self._scale = float(world.size)  # DDP and FSDP average gradients; we want their sum
        if compute.compile:
            for block in model.model.layers:  # one by one: all have one code, which is compiled once
                block.compile()
        module: nn.Module = _Loss(model, loss)
        if self._sharded:
            _shard(model, world, compute)
        elif world.is_spread:
            # Without device_ids: it would send all of a batch to the GPU, where all but segments are.
            module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        self._model, self._module = model, module

    def backward(self, batch: Sequence[Tensor], total: float, last: bool, **options: Any) -> Tensor:
        """Add the gradients of one micro-batch's loss, divided by the weight of the step on all devices.

        They are exchanged with the last micro-batch only. Returns this device's part of the loss.
        """
        quiet = contextlib.nullcontext()
        if self._sharded:
            self._model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._module, nn.parallel.DistributedDataParallel) and not last:
            quiet = self._module.no_sync()  # type: ignore[assignment]
        with quiet:
            part: Tensor = self._module(*batch, **options) / total
            (part * self._scale if self._scale != 1 else part).backward()  # type: ignore[no-untyped-call]
        return part.detach()

    def clip(self, limit: float) -> float:
        """Scale gradients down to the global norm `limit`; the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _shard(model: MobileLLM, world: World, compute: ComputeSettings) -> None:
    """FSDP2: every block is gathered when it runs; embedding, norm and head when the model does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    half = gathers_in_half(world, compute)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy is not None else {})
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "hidden")


def evaluation_precision(world: World, compute: ComputeSettings) -> str:
    """float32 whatever the run computes in: the model it leaves is stored so, and gives the same numbers.

    Only where fsdp hands out weights in bfloat16 it is that.
    """
    return "bfloat16" if gathers_in_half(world, compute) else "float32"


def gathers_in_half(world: World, compute: ComputeSettings) -> bool:
    """Whether a forward pass sees the weights in bfloat16 only: those of fsdp on GPUs, which send them so."""
    spread = world.is_spread and compute.strategy == "fsdp"
    return spread and compute.precision == "bfloat16" and world.device.type == "cuda"


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Make the parameters of a sharded model those that the optimiser knows.

    A forward pass without a backward one (an evaluation) leaves embedding and norm gathered, under the same
    names; blocks are not.
    """
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def whole_model(model: MobileLLM) -> MobileLLM | None:
    """A plain copy of a sharded model, on the first process; None on the others. All must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    with torch.device("meta"):
        copy = MobileLLM(model.config)
    copy.load_state_dict(tensors, strict=True, assign=True)
    return copy
