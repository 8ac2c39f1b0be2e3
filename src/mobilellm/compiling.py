"""Compiling a library of compiled.py: every source by a process of its own, all at once."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mobilellm.atomic import atomic_write
from mobilellm.compiled import NotCompiledError, Recipe

_LONGEST_SECONDS = 300


def compile_library(recipe: Recipe, texts: Mapping[str, str], library: Path) -> None:
    """Make the file `library` of `texts`; it appears whole or not at all.

    Raises NotCompiledError without a compiler or with what it said, OSError where nothing can be written.
    """
    compiler = os.environ.get(recipe.variable) or next(
        filter(None, map(shutil.which, recipe.compilers)), None
    )
    if compiler is None:
        raise NotCompiledError(f"there is no compiler ({', '.join(recipe.compilers)}); install one of them")
    if not compiler.split() or shutil.which(compiler.split()[0]) is None:
        raise NotCompiledError(
            f"{compiler}: {recipe.variable} names no program; let it name a compiler, or unset it"
        )
    with atomic_write(library) as temporary, TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        try:
            _compile(recipe, compiler.split(), folder, temporary)
        except subprocess.SubprocessError as error:
            said = getattr(error, "stderr", None) or str(error)
            raise NotCompiledError(f"{compiler}: {' '.join(said.split())[:300]}") from None


def opened_without_cache(recipe: Recipe, texts: Mapping[str, str]) -> ctypes.CDLL:
    """Compiled for this process alone. Raises as `compile_library`."""
    with TemporaryDirectory() as folder:  # once loaded, the file is no longer needed
        library = Path(folder) / f"{recipe.name}.so"
        compile_library(recipe, texts, library)
        return ctypes.CDLL(str(library))


def _compile(recipe: Recipe, compiler: list[str], folder: str, library: Path) -> None:
    """Raises OSError or SubprocessError, its stderr what the compiler said."""
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
