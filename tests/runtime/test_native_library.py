from __future__ import annotations

import platform
from pathlib import Path

import pytest

from mobilellm.runtime import native_library

SOURCES = Path(native_library.__file__).with_name("native")
X86_64 = [f"kernels_{isa}.cpp" for isa in ("avx2", "avxvnni", "avx512vl", "avx512")]


@pytest.mark.parametrize(
    ("machine", "own"),
    [
        ("x86_64", dict(zip(X86_64, ("-mavx2", "-mavxvnni?", "-mavx512vl", "-mavx512vnni"), strict=True))),
        ("AMD64", dict(zip(X86_64, ("-mfma", "-mavx2", "-mavx512vnni", "-mavx512bw"), strict=True))),
        ("aarch64", {"kernels_neon.cpp": None, "kernels_dotprod.cpp": "-march=armv8.2-a+dotprod"}),
        ("arm64", {"kernels_neon.cpp": None, "kernels_dotprod.cpp": "-march=armv8.2-a+dotprod"}),
        ("riscv64", {}),
    ],
)
def test_a_processor_gets_its_own_kernels_and_their_flags(
    monkeypatch: pytest.MonkeyPatch, machine: str, own: dict[str, str | None]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    recipe = native_library.recipe()
    kernels = {name: flags for name, flags in recipe.sources.items() if name.startswith("kernels_")}
    assert kernels.keys() == {"kernels_scalar.cpp", *own}
    assert kernels["kernels_scalar.cpp"] == ()
    assert all(flag is None or flag in kernels[name] for name, flag in own.items())
    assert "-ffp-contract=off" in recipe.flags
    assert "-pthread" in recipe.link_flags
    assert {name for name in recipe.sources if not name.startswith("kernels_")} == {
        file.name for file in SOURCES.glob("*.cpp") if not file.name.startswith("kernels_")
    }


def test_a_library_that_came_along_is_opened_only_where_its_name_is_that_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native_library.py"))
    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda name: opened.append(Path(name).name))
    (tmp_path / "native-engine-0123456789abcdef.so").touch()
    native_library._packaged()
    assert opened == []
    right = f"native-engine-{native_library.fingerprint()}.so"
    (tmp_path / right).touch()
    native_library._packaged()
    assert opened == [right]
