"""The device of this machine that a run would train on, and how fast it is."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobilellm.hardware import peak_flops

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    name: str
    memory_bytes: int | None
    peak_flops: float
    """Of one device, or of the whole CPU whatever the number of processes on it."""
    peak_source: str
    is_gpu: bool
    has_kernels: bool = False
    """Of a CPU, whether it can compile those for training."""


def this_device(precision: str = "bfloat16", seconds: float = 0.5, kind: str | None = None) -> Device:
    """The device that training would use here, told `kind` (cpu, cuda) or not.

    Its peak comes from the data sheet, or is measured. Raises ValueError for a device that is not there.
    """
    import torch

    from mobilellm.model import cpu_kernels
    from mobilellm.model.cpu_kernels import Kernels
    from mobilellm.train.distributed import named_device

    place = named_device(kind)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if place.type == "cuda":
        name = name_of(place)
        memory = torch.cuda.get_device_properties(place).total_memory
        if (peak := peak_flops(name)) is not None:
            return Device(name, memory, peak, "dense bf16, data sheet", is_gpu=True)
        peak = measured_flops(dtype, place, seconds)
        return Device(name, memory, peak, f"measured, {precision} matrix products", is_gpu=True)
    peak = measured_flops(dtype, place, seconds)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiled = isinstance(cpu_kernels.load(), Kernels)
    return Device(name_of(place), memory, peak, f"measured, {precision} matrix products", False, compiled)


def name_of(place: torch.device) -> str:
    """A GPU as its driver calls it; a CPU by how many threads compute."""
    import torch

    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def measured_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """The best FLOP/s of a matrix product of 1,024 cubed (of 4,096 on a GPU) within `seconds`."""
    import torch

    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, stop = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < stop:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
