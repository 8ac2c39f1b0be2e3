"""What `pip` makes of this checkout: a wheel with the compiled engine, one without, an editable install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from gguf_files import exported

from mobilellm.runtime import native_library

ROOT = Path(__file__).parents[1]
pytest.importorskip("scikit_build_core", reason="needs scikit-build-core, of the extra `dev`")
if shutil.which("cmake") is None or shutil.which("c++") is None:
    pytest.skip("needs CMake and a C++ compiler", allow_module_level=True)
pytestmark = pytest.mark.slow

RUN = """
import sys
site, file = sys.argv[1:]
sys.path.insert(0, site)
from pathlib import Path
import mobilellm, mobilellm.runtime
assert Path(mobilellm.__file__).is_relative_to(site), mobilellm.__file__
model = mobilellm.runtime.load(file, threads=2, say=print)
text = model.generate("some words", max_new_tokens=8)[0]
print(type(model.engine).__name__, len(text.tokens) > 0)
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def pip(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=600, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def wheel(folder: Path, **environment: str) -> Path:
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), ".", **environment)
    (made,) = folder.iterdir()
    return made


def unpacked(made: Path, folder: Path) -> Path:
    """A place for packages with the wheel's content, numpy and tokenizers, and nothing else."""
    with zipfile.ZipFile(made) as archive:
        archive.extractall(folder)
    for package in ("numpy", "tokenizers"):
        files = distribution(package).files or ()
        for top in {file.parts[0] for file in files} - {".."}:
            (folder / top).symlink_to(distribution(package).locate_file(top))
    return folder


def run_without_a_compiler(site: Path, file: Path, tmp_path: Path) -> list[str]:
    """What a model in `file` says when only the packages of `site` are there, and no program at all."""
    (tmp_path / "nothing").mkdir()
    environment = {"PATH": str(tmp_path / "nothing"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, str(site), str(file)],
        capture_output=True, text=True, check=False, timeout=100, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "cache").exists()
    return done.stdout.splitlines()


def test_a_wheel_runs_a_file_without_a_compiler_and_without_torch(tmp_path: Path) -> None:
    made = wheel(tmp_path / "wheels")
    assert "-py3-none-" in made.name
    assert not made.name.endswith("-any.whl")
    library = f"mobilellm/runtime/native-engine-{native_library.fingerprint()}.so"
    assert library in zipfile.ZipFile(made).namelist()
    site = unpacked(made, tmp_path / "site")
    file, _ = exported(tmp_path, "Q8_0")
    assert run_without_a_compiler(site, file, tmp_path) == ["NativeModel True"]


def test_a_library_of_other_sources_is_never_opened(tmp_path: Path) -> None:
    site = unpacked(wheel(tmp_path / "wheels"), tmp_path / "site")
    with (site / "mobilellm" / "runtime" / "native" / "threads.h").open("a") as source:
        source.write("// changed\n")
    said, ran = run_without_a_compiler(site, exported(tmp_path, "Q8_0")[0], tmp_path)
    assert said == (
        "the native engine was not compiled (there is no compiler (c++, g++, clang++); install one of them); "
        "the model runs in numpy, many times slower"
    )
    assert ran == "ReferenceModel True"


@pytest.mark.parametrize("lacking", ["CMake", "a compiler"])
def test_where_nothing_can_be_compiled_the_wheel_is_made_without(tmp_path: Path, lacking: str) -> None:
    without = (
        {"PATH": str(tmp_path / "nothing at all")} if lacking == "CMake" else {"CXX": "no-such-compiler"}
    )
    made = wheel(tmp_path / "wheels", **without)
    assert made.name.endswith("-py3-none-any.whl")
    site = unpacked(made, tmp_path / "site")
    _, ran = run_without_a_compiler(site, exported(tmp_path, "F32")[0], tmp_path)
    assert ran == "ReferenceModel True"


def test_an_editable_install_is_the_checkout_itself(tmp_path: Path) -> None:
    """Nothing is compiled then: a source that changes is compiled when it is next used."""
    pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(tmp_path), "-e", ".")
    lines = [line for file in tmp_path.glob("*.pth") for line in file.read_text().splitlines()]
    assert str(ROOT / "src") in lines
    assert not list(tmp_path.rglob("*.so"))
