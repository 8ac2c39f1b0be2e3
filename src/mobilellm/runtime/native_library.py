"""The compiled engine (native/*.cpp) as ctypes functions, their types those of native/engine.h.

A wheel brings the library (native/CMakeLists.txt); a checkout, or a wheel that was made without a compiler,
compiles it on first use. What is opened was made of the sources that lie here: both go by a hash of them.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

from mobilellm.compiled import NotCompiledError, Recipe, digest, open_library

POINTER, INTEGER, SIZE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
_NAME = "native-engine"
_SOURCES = Path(__file__).with_name("native")
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
    "create": (POINTER, [POINTER] * 4 + [INTEGER] * 2 + [ctypes.c_char_p, POINTER, SIZE]),
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
    "use_threads": (INTEGER, [POINTER, INTEGER]),
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
        return Library(_packaged() or open_library(recipe()))
    except (NotCompiledError, AttributeError) as error:
        return str(error)


def recipe() -> Recipe:
    """How to compile it on this machine: the table of native/flags.txt."""
    processor = platform.machine().lower()
    sources: dict[str, tuple[str, ...]] = {file.name: () for file in sorted(_SOURCES.glob("*.cpp"))}
    shared: dict[str, tuple[str, ...]] = {}
    for line in (_SOURCES / "flags.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        what, processors, *flags = line.split()
        if processors != "any" and processor not in processors.split(","):
            del sources[what]
        elif what in ("all", "link"):
            shared[what] = tuple(flags)
        else:
            sources[what] = tuple(flags)
    return Recipe(
        name=_NAME,
        folder=_SOURCES,
        sources=sources,
        headers=[file.name for file in sorted(_SOURCES.glob("*.h"))],
        flags=shared["all"],
        link_flags=shared["link"],
        compilers=("c++", "g++", "clang++"),
        variable="CXX",
    )


def _packaged() -> ctypes.CDLL | None:
    """The library that came with the package, if it was made of these very sources and opens here."""
    files = list(Path(__file__).parent.glob(f"{_NAME}-*.so"))
    try:
        right = f"{_NAME}-{fingerprint()}.so" if files else None
        return next((ctypes.CDLL(str(file)) for file in files if file.name == right), None)
    except OSError:
        return None


def fingerprint() -> str:
    """Of everything the library is made of, as native/CMakeLists.txt computes it too."""
    texts = sorted(file for file in _SOURCES.iterdir() if file.suffix in (".cpp", ".h", ".txt"))
    listing = "".join(f"{file.name} {digest(file.read_bytes())}\n" for file in texts)
    return digest(listing.encode())[:16]
