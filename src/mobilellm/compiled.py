"""C and C++ of this package: compiled on first use, kept in the user's cache, and opened with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mobilellm.atomic import atomic_write
from mobilellm.user_cache import user_cache

_LONGEST_SECONDS = 300


@dataclass(frozen=True)
class Recipe:
    """How one library is made."""

    name: str
    """Of the file in the cache, before its fingerprint."""
    package: str
    folder: str
    """Where the sources lie: a package, and a folder in it ("" for the package's own)."""
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
    """The library, compiled if the cache has none of these sources and flags. Raises NotCompiledError."""
    compiler = os.environ.get(recipe.variable) or next(
        filter(None, map(shutil.which, recipe.compilers)), None
    )
    if compiler is None:
        raise NotCompiledError(f"there is no compiler ({', '.join(recipe.compilers)}); install one of them")
    texts = _texts(recipe)
    name = f"{recipe.name}-{_fingerprint(recipe, compiler, texts)}.so"
    try:
        try:
            file = user_cache() / name
            if not file.is_file():
                with atomic_write(file) as temporary:
                    _compile(recipe, compiler.split(), texts, temporary)
            return ctypes.CDLL(str(file))
        except OSError:  # no home, no room, or a mount that nothing may be run from
            with tempfile.TemporaryDirectory() as folder:  # once loaded, the file is no longer needed
                _compile(recipe, compiler.split(), texts, Path(folder) / name)
                return ctypes.CDLL(str(Path(folder) / name))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise NotCompiledError(f"{compiler}: {' '.join(str(detail).split())[:300]}") from None


def _texts(recipe: Recipe) -> dict[str, str]:
    folder = resources.files(recipe.package)
    if recipe.folder:
        folder = folder.joinpath(recipe.folder)
    return {
        name: folder.joinpath(name).read_text(encoding="utf-8") for name in (*recipe.sources, *recipe.headers)
    }


def _fingerprint(recipe: Recipe, compiler: str, texts: Mapping[str, str]) -> str:
    def parts() -> Iterator[str]:
        yield compiler
        yield recipe.made_for
        for name, text in texts.items():
            yield from (name, text, *recipe.sources.get(name, ()), "")
        for flags in (recipe.flags, recipe.link_flags, *recipe.targets):
            yield from (*flags, "")

    return hashlib.sha256("\0".join(parts()).encode()).hexdigest()[:16]


def _compile(recipe: Recipe, compiler: list[str], texts: Mapping[str, str], library: Path) -> None:
    """Raises OSError or SubprocessError, its stderr what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        sources = {name: _known(compiler, flags, folder) for name, flags in recipe.sources.items()}
        for target in recipe.targets:
            commands = [
                [*compiler, *recipe.flags, *target, *own, "-c", name, "-o", f"{name}.o"]
                for name, own in sources.items()
            ]
            try:
                _run_together(commands, folder)
                break
            except subprocess.CalledProcessError:
                if target == recipe.targets[-1]:
                    raise
        objects = [f"{name}.o" for name in recipe.sources]
        _run_together(
            [[*compiler, "-shared", *objects, "-o", str(library.absolute()), *recipe.link_flags]], folder
        )


def _known(compiler: list[str], flags: Sequence[str], folder: str) -> list[str]:
    """The flags of one source without those that may be left out and have to be."""

    def is_known(flag: str) -> bool:
        try:
            _run_together([[*compiler, flag, "-x", "c", "-fsyntax-only", os.devnull]], folder)
        except subprocess.CalledProcessError:
            return False
        return True

    return [flag.removesuffix("?") for flag in flags if not flag.endswith("?") or is_known(flag[:-1])]


def _run_together(commands: Sequence[Sequence[str]], folder: str) -> None:
    running = [
        subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for process, command in zip(running, commands, strict=True):
            _, errors = process.communicate(timeout=_LONGEST_SECONDS)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, list(command), stderr=errors)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
