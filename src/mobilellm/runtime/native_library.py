"""The compiled engine (native/*.cpp) as ctypes functions, their types those of native/engine.h."""

from __future__ import annotations

import ctypes
import functools
import platform

from mobilellm.compiled import NotCompiledError, Recipe, open_library

POINTER, INTEGER, SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_X86 = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"),
}
"""Sources of this family of processors, and the flags each is compiled with."""
RECIPE = Recipe(
    name="native-engine",
    package="mobilellm.runtime",
    folder="native",
    sources={
        "engine.cpp": (),
        "forward.cpp": (),
        "scratch.cpp": (),
        "model.cpp": (),
        "threads.cpp": (),
        "kernels_scalar.cpp": (),
        **(_X86 if platform.machine().lower() in ("x86_64", "amd64") else {}),
    },
    headers=(
        "engine.h", "forward.h", "kernels.h", "kernels_body.h", "model.h", "pass.h", "scratch.h", "threads.h",
    ),
    flags=(
        "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi",
        "-ffp-contract=off",  # the order of operations is the written one, whatever the tile
        "-fno-math-errno",
    ),
    link_flags=("-pthread", "-lm"),
    compilers=("c++", "g++", "clang++"),
    variable="CXX",
)  # fmt: skip
DONE, CANCELLED, NO_MEMORY, REFUSED = range(4)


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, INTEGER) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "num_steps",
        )),
        ("rms_norm_eps", ctypes.c_float),
        ("rope_theta", ctypes.c_double),
    )  # fmt: skip


class Tensor(ctypes.Structure):
    _fields_ = (("data", POINTER), ("type", INTEGER), ("rows", INTEGER), ("columns", INTEGER))


_SIGNATURES = {  # name: (result, arguments)
    "create": (POINTER, [POINTER, POINTER, POINTER, POINTER, INTEGER, ctypes.c_char_p, POINTER, SIZE]),
    "fill": (None, [POINTER] + [INTEGER] * 3),
    "destroy": (None, [POINTER]),
    "isa": (ctypes.c_char_p, [POINTER]),
    "arena_bytes": (ctypes.c_int64, [POINTER]),
    "sequence_create": (POINTER, [POINTER, INTEGER]),
    "sequence_destroy": (None, [POINTER]),
    "sequence_read": (None, [POINTER, INTEGER, POINTER, POINTER]),
    "sequence_write": (None, [POINTER, INTEGER, POINTER, POINTER]),
    "forward": (INTEGER, [POINTER, INTEGER, POINTER, POINTER, POINTER, POINTER]),
    "logits": (INTEGER, [POINTER, INTEGER, POINTER, POINTER]),
    "cancel": (None, [POINTER]),
    "half": (INTEGER, [ctypes.c_char_p, ctypes.c_float]),
    "read": (ctypes.c_uint64, [POINTER, POINTER, SIZE]),
}


class Library:
    """Its functions by their names without the prefix; the GIL is released while one runs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"mobilellm_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:  # for type checkers: all are set above
        raise AttributeError(name)


@functools.cache
def load() -> Library | str:
    """The library, or one line that says why there is none."""
    try:
        return Library(open_library(RECIPE))
    except (NotCompiledError, AttributeError) as error:
        return str(error)
