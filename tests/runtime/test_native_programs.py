"""The engine without Python: every kernel against the portable ones, other processors, sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from programs import compiler_knows, said

from mobilellm.runtime.engine import INSTRUCTION_SETS

SOURCES = Path(__file__).parent / "native"
EMULATED = "avxvnni, emulated"
"""Compiled for AVX-VNNI, with that instruction computed by what handles the signal of its not being there."""
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = pytest.mark.slow


def built(folder: Path, *options: str) -> Path:
    """A folder with the programs of native/, compiled."""
    needed = ("cmake", "c++")
    if missing := [program for program in needed if shutil.which(program) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    for command in (
        ["cmake", "-S", str(SOURCES), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


def sets_of_instructions(lines: list[str]) -> list[str]:
    """Those that were compared; the portable one's numbers are what the others are compared with."""
    sets = [line.split(": ")[0] for line in lines if line.endswith("numbers are right")]
    here = [each for each in sets if each != EMULATED]
    assert set(here) < set(INSTRUCTION_SETS)
    assert [line for line in lines if not line.endswith("numbers are right")] == [
        f"best: {[*here, 'scalar'][0]}"
    ]
    return sets


def test_every_kernel_computes_what_the_portable_one_does(tmp_path: Path) -> None:
    sets = sets_of_instructions(said(built(tmp_path) / "compare_kernels"))
    if platform.machine() == "x86_64":
        flags = Path("/proc/cpuinfo").read_text("utf-8")
        assert ("avx2" in sets) == (" avx2 " in flags)
        assert ("avx512" in sets) == ("avx512vl" in sets) == ("avx512_vnni" in flags)
        if compiler_knows("-mavxvnni"):
            assert ("avxvnni" in sets) == (" avx_vnni " in flags)
            assert (EMULATED in sets) == (" avx2 " in flags and " avx_vnni " not in flags)


@pytest.fixture(scope="module")
def for_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := [program for program in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(program) is None]:
        pytest.skip(f"needs {' and '.join(missing)}; on Debian: apt install g++-aarch64-linux-gnu qemu-user")
    return built(
        tmp_path_factory.mktemp("arm"), "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("processor", "sets"), [("max", ["dotprod", "neon"]), ("cortex-a53", ["neon"])], ids=["with", "without"]
)
def test_arm_with_and_without_dot_products(for_arm: Path, processor: str, sets: list[str]) -> None:
    emulator = (ARM_EMULATOR, "-cpu", processor)
    assert sets_of_instructions(said(*emulator, for_arm / "compare_kernels")) == sets
    assert said(*emulator, for_arm / "run_engine", sets[0]) == [f"{sets[0]}: no fault found"]


def sanitized(folder: Path, kind: str) -> Path:
    return built(folder, f"-DCMAKE_CXX_FLAGS=-fsanitize={kind} -fno-sanitize-recover=all -g")


def test_no_address_and_no_operation_is_wrong(tmp_path: Path) -> None:
    programs = sanitized(tmp_path, "address,undefined")
    assert sets_of_instructions(said(programs / "compare_kernels"))
    assert all(line.endswith("no fault found") for line in said(programs / "run_engine"))


def test_threads_meet_without_a_race(tmp_path: Path) -> None:
    programs = sanitized(tmp_path, "thread")
    # At addresses that do not change: under others the sanitizer of older compilers does not start.
    fixed = ("setarch", "-R") if shutil.which("setarch") else ()
    assert said(*fixed, programs / "run_engine", "scalar") == ["scalar: no fault found"]
