"""C and C++ of this package: compiled on first use, kept in the user's cache, and opened with ctypes.

A library goes by its sources, its flags and the compiler at hand: after an upgrade of that it is made anew.
Most starts find it in the cache: compiling.py is imported only where it is not there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilellm.user_cache import user_cache

try:  # what hashlib takes it from; hashlib itself loads OpenSSL, 4 MB, and 8 ms of every start
    from _sha3 import sha3_256  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha3_256


@dataclass(frozen=True)
class Recipe:
    """How one library is made."""

    name: str
    """Of the file in the cache, before its fingerprint."""
    folder: Path
    """Where the sources lie."""
    sources: Mapping[str, Sequence[str]]
    """File names, each with the flags it needs beside the others'. One that ends in ? is left out where the
    compiler does not know it."""
    headers: Sequence[str]
    flags: Sequence[str]
    """For compiling every source."""
    link_flags: Sequence[str] = ()
    compilers: Sequence[str] = ("cc", "gcc", "clang")
    """The first that is installed is taken, unless the variable below names one."""
    variable: str = "CC"
    targets: Sequence[Sequence[str]] = ((),)
    """More flags for all sources, tried in turn: some compilers know only some."""
    made_for: str = ""
    """What the result depends on beside all this: the processor, say, where flags ask for the one at hand."""


class NotCompiledError(Exception):
    """There is no compiler, or what it made cannot be opened; one line says why."""


def open_library(recipe: Recipe) -> ctypes.CDLL:
    """The library, compiled if the cache has none of these sources, flags and compiler.

    Without a compiler it is the last that any made of them. Raises NotCompiledError.
    """
    texts = {
        name: (recipe.folder / name).read_text(encoding="utf-8")
        for name in (*recipe.sources, *recipe.headers)
    }
    try:
        try:
            file = _file(recipe, texts)
            if not file.is_file():
                from mobilellm.compiling import compile_library

                compile_library(recipe, texts, file)
            return ctypes.CDLL(str(file))
        except OSError:  # no home, no room, or a mount that nothing may be run from
            from mobilellm.compiling import opened_without_cache

            return opened_without_cache(recipe, texts)
    except OSError as error:
        raise NotCompiledError(f"{recipe.name}: {' '.join(str(error).split())[:300]}") from None


def digest(data: bytes) -> str:
    """SHA3-256 in hexadecimal."""
    return str(sha3_256(data).hexdigest())


def _file(recipe: Recipe, texts: Mapping[str, str]) -> Path:
    """Where the library is kept, or will be."""
    cache, name = user_cache(), f"{recipe.name}-{_fingerprint(recipe, texts)}"
    compiler = _compiler_at_hand(recipe)
    if not compiler:
        kept = sorted(cache.glob(f"{name}-*.so"), key=lambda file: file.stat().st_mtime)
        if kept:
            return kept[-1]
    return cache / f"{name}-{digest(compiler.encode())[:8]}.so"


def _compiler_at_hand(recipe: Recipe) -> str:
    """Path, size and time of the compiler's program; empty where there is none.

    To ask it for its version would take longer than all else here; shutil is a module that no start needs.
    """
    for program in os.environ.get(recipe.variable, "").split()[:1] or recipe.compilers:
        for folder in os.get_exec_path():
            file = os.path.join(folder, program)
            if os.path.isfile(file) and os.access(file, os.X_OK):
                status = os.stat(file)  # of the program itself, where this is a link
                return f"{file} {status.st_size} {status.st_mtime_ns}"
    return ""


def _fingerprint(recipe: Recipe, texts: Mapping[str, str]) -> str:
    def parts() -> Iterator[str]:
        yield os.environ.get(recipe.variable, "")
        yield recipe.made_for
        for name, text in texts.items():
            yield from (name, text, *recipe.sources.get(name, ()), "")
        for flags in (recipe.flags, recipe.link_flags, *recipe.targets):
            yield from (*flags, "")

    return digest("\0".join(parts()).encode())[:16]
