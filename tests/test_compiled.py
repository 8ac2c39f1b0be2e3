from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mobilellm import compiled, compiling
from mobilellm.compiled import NotCompiledError, Recipe, open_library

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Two sources and a header in a folder of their own, and an empty cache."""
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "number.h").write_text("#define NUMBER 3\n")
    (folder / "one.c").write_text(
        '#include "number.h"\nint two(void);\nint one(void) { return NUMBER + two(); }\n'
    )
    (folder / "two.c").write_text("int two(void) { return TWICE * 2; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return Recipe(
        "sample",
        folder,
        {"one.c": (), "two.c": ("-DTWICE=20",)},
        ("number.h",),
        ("-O1", "-fPIC"),
    )


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "mobilellm").iterdir())


def test_every_source_gets_its_own_flags_and_the_library_is_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_library(recipe).one() == 43
    (name,) = cached(tmp_path)
    assert name.startswith("sample-")
    monkeypatch.setattr(compiling, "_run_together", lambda *_: pytest.fail("compiled again"))
    assert open_library(recipe).one() == 43


def test_whatever_changes_makes_a_new_library(recipe: Recipe, tmp_path: Path) -> None:
    open_library(recipe)
    assert open_library(replace(recipe, sources={"one.c": (), "two.c": ("-DTWICE=30",)})).one() == 63
    assert open_library(replace(recipe, flags=("-O2", "-fPIC"))).one() == 43
    assert open_library(replace(recipe, made_for="another processor")).one() == 43
    (recipe.folder / "number.h").write_text("#define NUMBER 4\n")
    assert open_library(recipe).one() == 44
    assert len(cached(tmp_path)) == 5


def test_another_compiler_makes_a_new_library_and_none_takes_the_last(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, real = tmp_path / "programs", shutil.which("cc")
    programs.mkdir()
    compiler = programs / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{path}")
    assert open_library(recipe).one() == 43
    assert open_library(recipe).one() == 43
    (before,) = cached(tmp_path)
    compiler.write_text(f'#!/bin/sh\nexec {real} -DUPGRADED "$@"\n')
    assert open_library(recipe).one() == 43
    assert len(cached(tmp_path)) == 2
    (after,) = {*cached(tmp_path)} - {before}
    opened: list[str] = []
    monkeypatch.setattr(compiled.ctypes, "CDLL", opened.append)
    monkeypatch.setenv("PATH", str(tmp_path))
    open_library(recipe)
    assert [Path(file).name for file in opened] == [after]


def test_targets_are_tried_in_turn(recipe: Recipe) -> None:
    assert open_library(replace(recipe, targets=(("-march=no-such",), ("-DOTHER",)))).one() == 43


def test_flags_that_may_be_left_out_are_where_the_compiler_does_not_know_them(recipe: Recipe) -> None:
    own = ("-DTWICE=20", "-mno-such-instructions?", "-UTWICE?", "-DTWICE=30?")
    assert open_library(replace(recipe, sources={"one.c": (), "two.c": own})).one() == 63


def test_what_the_compiler_says_is_said_in_one_line(recipe: Recipe, tmp_path: Path) -> None:
    (recipe.folder / "number.h").write_text("#define NUMBER no_such_name\n")
    with pytest.raises(NotCompiledError, match="no_such_name") as raised:
        open_library(recipe)
    assert "\n" not in str(raised.value)
    assert cached(tmp_path) == []


def test_no_compiler_is_said(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotCompiledError, match=r"there is no compiler \(no-such-compiler\)"):
        open_library(replace(recipe, compilers=("no-such-compiler",)))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NotCompiledError, match="no-such-compiler"):
        open_library(recipe)
    monkeypatch.setenv("MY_COMPILER", "cc -DUNUSED")
    assert open_library(replace(recipe, variable="MY_COMPILER")).one() == 43


def test_without_a_cache_it_is_compiled_for_this_process_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_library(recipe).one() == 43


def test_a_damaged_file_in_the_cache_is_not_used(recipe: Recipe, tmp_path: Path) -> None:
    open_library(recipe)
    file = tmp_path / "cache" / "mobilellm" / cached(tmp_path)[0]
    file.unlink()  # the one in memory must stay whole
    file.write_bytes(b"not a library")
    assert open_library(recipe).one() == 43
