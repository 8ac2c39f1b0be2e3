"""Our files in llama.cpp, where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import SHAPE, saved, shared

from mobilellm.export.export import export
from mobilellm.export.targets import KINDS, Options
from mobilellm.export.verify import Settings
from mobilellm.installation import missing_packages

SETTINGS = Settings(tokens=96)
without = bool(missing_packages("llama_cpp"))


@pytest.mark.skipif(without, reason="needs llama-cpp-python (extra peers)")
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "bf16"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_it_passes_every_check_there_too(tmp_path: Path, kind: str, repeats: int) -> None:
    saved(tmp_path / "model", SHAPE if repeats == 1 else shared("immediate", 2))
    options = Options(kind, unroll=repeats == 2)
    exported = export(tmp_path / "model", tmp_path / "m.gguf", KINDS["gguf"], options, SETTINGS)
    assert exported.report is not None
    assert exported.report.failed == []
    assert set(exported.report.runtimes) == {"engine", "llama.cpp"}
    assert {"logits in llama.cpp", "stop token in llama.cpp"} <= {
        check.name for check in exported.report.checks
    }


@pytest.mark.skipif(not without, reason="llama-cpp-python is installed")
def test_it_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    saved(tmp_path / "model", SHAPE)
    settings = Settings(tokens=96, runtime="llama.cpp")
    with pytest.raises(ImportError, match=r"needs the package llama-cpp-python; install with: .*\[peers\]"):
        export(tmp_path / "model", tmp_path / "m.gguf", KINDS["gguf"], Options(), settings)


def test_a_shared_file_is_not_for_it(tmp_path: Path) -> None:
    saved(tmp_path / "model", shared("immediate", 2))
    settings = Settings(tokens=96, runtime="llama.cpp")
    with pytest.raises(
        ValueError, match="runtime = llama.cpp cannot run this artefact; choose one of engine"
    ):
        export(tmp_path / "model", tmp_path / "m.gguf", KINDS["gguf"], Options(), settings)
