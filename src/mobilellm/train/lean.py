"""Training on one CPU in bfloat16 with less memory: where it is right, and what it changes.

Its own AdamW (`optim.KernelAdamW`), and, with one micro-batch a step, gradients of matrices in bfloat16, the
dtype that products give them in. Several micro-batches are summed, in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mobilellm.model import cpu_kernels
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.distributed import World
from mobilellm.train.settings import TrainSettings


def kernels(model: MobileLLM, settings: TrainSettings, world: World) -> Kernels | None:
    """Those to train with; None where torch's own optimiser is the right one."""
    found = cpu_kernels.load() if _fits(model, settings, world) else None
    return found if isinstance(found, Kernels) else None


@contextlib.contextmanager
def gradients(model: MobileLLM, settings: TrainSettings, world: World) -> Iterator[None]:
    """Within, gradients of matrices are bfloat16 where that is right. Such gradients are gone at the end."""
    batch = settings.batch
    once = batch.sequences_per_step <= batch.micro_batch
    whole = all(p.requires_grad for p in model.parameters())  # adapters are small: nothing is saved there
    narrow = once and whole and kernels(model, settings, world) is not None
    matrices = [p for p in model.parameters() if p.ndim == 2] if narrow else []
    for matrix in matrices:
        matrix.grad, matrix.grad_dtype = None, torch.bfloat16
    try:
        yield
    finally:
        for matrix in matrices:
            matrix.grad, matrix.grad_dtype = None, torch.float32


def _fits(model: MobileLLM, settings: TrainSettings, world: World) -> bool:
    compute = settings.compute
    narrow = compute.precision == "bfloat16" and not compute.compile
    return (
        not world.is_spread
        and narrow
        and settings.optim.name == "adamw"
        and all(
            p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous()
            for p in model.parameters()
            if p.requires_grad
        )
    )
