"""AVX-VNNI on machines that may lack it: how its kernels are compiled, and that they compute what others do.

The code itself is run in test_native_programs.py, where the processor lacks it by emulation.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf_files import exported
from programs import compiler_knows, compiler_without, said

from mobilellm.compiled import open_library
from mobilellm.runtime import engine, native_library

FLAG = "-mavxvnni"
SOURCES = Path(native_library.__file__).with_name("native")

if platform.machine() != "x86_64":
    pytest.skip("this is not x86-64", allow_module_level=True)
if shutil.which("c++") is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_avxvnni_kernels_hold_no_instruction_of_avx512(tmp_path: Path) -> None:
    if not compiler_knows(FLAG):
        pytest.skip("this compiler is older than AVX-VNNI")
    recipe, made = native_library.recipe(), tmp_path / "kernels.o"
    own = [flag.removesuffix("?") for flag in recipe.sources["kernels_avxvnni.cpp"]]
    said("c++", *recipe.flags, *own, "-c", SOURCES / "kernels_avxvnni.cpp", "-o", made)
    code = [line.split("\t") for line in said("objdump", "-d", "--insn-width=16", made)]
    instructions = [fields[1:] for fields in code if len(fields) == 3]
    assert sum(text.startswith("{vex} vpdpbusd") for _, text in instructions) > 100
    # EVEX begins with 62, which 64-bit code uses for nothing else; masks come in VEX too.
    assert [each for each in instructions if each[0].startswith("62 ") or re.search(r"%k\d", each[1])] == []


@pytest.mark.slow
def test_a_compiler_without_avxvnni_makes_all_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler_without(FLAG, tmp_path)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = native_library.Library(open_library(native_library.recipe())).half
    assert half(b"avxvnni", 1) == -1
    assert half(b"", 1) == half(b"scalar", 1) == 0x3C00


def test_cmake_leaves_out_what_the_compiler_does_not_know(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")

    def compiles_with(compiler: str | Path) -> dict[str, str]:
        folder = tmp_path / f"build-{Path(compiler).name}"
        said(
            "cmake", "-S", SOURCES, "-B", folder, f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        )  # fmt: skip
        entries = json.loads((folder / "compile_commands.json").read_text("utf-8"))
        return {Path(entry["file"]).name: entry["command"] for entry in entries}

    commands, older = compiles_with("c++"), compiles_with(compiler_without(FLAG, tmp_path))
    assert commands.keys() == older.keys()
    assert (" -mavxvnni " in commands["kernels_avxvnni.cpp"]) == compiler_knows(FLAG)
    assert " -mavx2 -mfma -mf16c " in older["kernels_avxvnni.cpp"]
    assert "-mavxvnni" not in older["kernels_avxvnni.cpp"]
    for isa, flag in (("avx2", "-mf16c"), ("avx512vl", "-mavx512vnni"), ("avx512", "-mavx512bw")):
        assert f" {flag} " in older[f"kernels_{isa}.cpp"]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_what_differs_only_in_how_bytes_are_multiplied_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Sums of whole numbers are exact, and those of floats are taken in one order."""
    file, _ = exported(tmp_path, kind)
    tokens, found = np.arange(3, 80), {}
    for isa in ("avx2", "avxvnni", "avx512vl"):
        try:
            model = engine.load(file, 2, isa)
        except ValueError:
            continue  # not this processor's
        found[isa] = model.logits(model.forward(tokens, model.new_cache()))
    if len(found) < 2:
        pytest.skip(f"this processor has only {' and '.join(found) or 'none of them'}")
    first, *others = found.values()
    for other in others:
        np.testing.assert_array_equal(other, first)
