"""The C functions of cpu_*.c: compiled for this processor on first use, kept in the user's cache.

Where there is no C compiler, or what it makes does not load, `load` says why, and training and scoring
take the plain path.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from mobilellm.compiled import NotCompiledError, Recipe, open_library

LONGEST = 2**16
"""Tokens of a sequence for which the functions have room."""


class Address:
    """Where a contiguous tensor begins, or such a number, or nothing."""

    @staticmethod
    def from_param(argument: Tensor | int | None) -> ctypes.c_void_p:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_void_p(argument)


POINTER, INTEGER, FLAG, FLOAT = Address, ctypes.c_int64, ctypes.c_int, ctypes.c_float
THREADS = FLAG
_SOURCES = (
    "cpu_kernels.c", "cpu_attention.c", "cpu_products.c", "cpu_pair_products.c", "cpu_optimizer.c",
    "cpu_distillation.c",
)  # fmt: skip
_PRODUCT = [*([POINTER] + [INTEGER] * 3 + [FLAG]) * 2, POINTER, INTEGER, POINTER, INTEGER, INTEGER, FLAG]
_SIGNATURES = {
    "rms_norm": [POINTER] * 5 + [INTEGER] * 2 + [FLOAT, THREADS],
    "rms_norm_again": [POINTER] * 3 + [INTEGER] * 2 + [THREADS],
    "rms_norm_backward": [POINTER] * 7 + [INTEGER] * 2 + [THREADS],
    "add": [POINTER] * 3 + [INTEGER, THREADS],
    "round_activations": [POINTER] + [INTEGER] * 2 + [FLAG, THREADS],
    "swiglu": [POINTER] * 2 + [INTEGER] * 2 + [THREADS],
    "swiglu_backward": [POINTER] * 4 + [INTEGER] * 2 + [THREADS],
    "rotary": [POINTER] * 6 + [INTEGER] * 7 + [THREADS] * 2,
    "move_heads": [POINTER] * 2 + [INTEGER] * 6 + [THREADS] * 2,
    "softmax": [POINTER] * 3 + [FLOAT] + [INTEGER] * 6 + [THREADS],
    "softmax_backward": [POINTER] * 4 + [FLOAT] + [INTEGER] * 6 + [THREADS],
    "embedding_backward": [POINTER] * 4 + [FLAG] + [INTEGER] * 2 + [THREADS],
    "cross_entropy": [POINTER] * 3 + [FLOAT, POINTER] + [INTEGER] * 2 + [THREADS],
    "distillation": [POINTER] * 6 + [FLOAT] * 4 + [POINTER] + [INTEGER] * 3 + [THREADS],
    "scoring_norm": [POINTER] * 4 + [FLAG] + [INTEGER] * 2 + [FLOAT, THREADS],
    "float_swiglu": [POINTER] * 2 + [INTEGER] * 2 + [THREADS],
    "attention": [POINTER] * 5 + [FLAG] + [INTEGER] * 5 + [THREADS],
    "highest": [POINTER] * 3 + [FLAG] + [INTEGER] * 2 + [THREADS],
    "multiply": _PRODUCT + [INTEGER] * 4 + [THREADS],
    "multiply_pairs": _PRODUCT + [INTEGER] * 4 + [THREADS],
    "sum_of_squares": [POINTER, FLAG, POINTER, INTEGER, THREADS],
    "adamw": [POINTER] * 4 + [FLAG] + [FLOAT] * 7 + [INTEGER, THREADS],
}
_MAY_FAIL = {
    "rms_norm_backward",
    "softmax",
    "softmax_backward",
    "embedding_backward",
    "attention",
    "distillation",
    "highest",
    "multiply",
    "multiply_pairs",
    "sum_of_squares",
}
"""These return 0, or something else where there was no memory."""
_NOT_EVERYWHERE = {"multiply_pairs"}
"""Only processors with the instructions for it have these."""


class Kernels:
    """Calls by name; tensors become addresses, the number of torch's threads is added at the end."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            if name in _NOT_EVERYWHERE and not hasattr(library, name):
                continue
            function = getattr(library, name)
            function.argtypes = signature
            function.restype = ctypes.c_int if name in _MAY_FAIL else None
            self._functions[name] = function
        library.keep_freed_memory()

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def __call__(self, name: str, *arguments: Tensor | float | None) -> None:
        """Tensors must be contiguous, their types and sizes those of cpu_kernels.c: it cannot check.

        Raises MemoryError where a function finds no memory for what it needs beside them.
        """
        if self._functions[name](*arguments, torch.get_num_threads()):
            raise MemoryError(f"no memory for {name} (cpu_*.c); use smaller batches")


@functools.cache
def load() -> Kernels | str:
    """The kernels, or one line that says why there are none."""
    try:
        return Kernels(open_library(_recipe()))
    except (NotCompiledError, AttributeError) as error:
        return str(error)


def _recipe() -> Recipe:
    return Recipe(
        name="cpu-kernels",
        folder=Path(__file__).parent,
        sources=dict.fromkeys(_SOURCES, ()),
        headers=("cpu_bf16.h", "cpu_exponential.h"),
        flags=(
            "-O3", "-std=c11", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
            "-fno-trapping-math",
        ),
        # Linked without OpenMP's library: the process already has torch's, and a second one would bring a
        # second set of threads that compete with the first.
        link_flags=("-lm",),
        targets=(("-march=native",), ("-mcpu=native",), ()),
        made_for=_processor(),
    )  # fmt: skip


def _processor() -> str:
    """What -march=native depends on: folders may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
