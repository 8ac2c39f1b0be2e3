"""Which directories are artefacts of other runtimes, and what is said where the runtime is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import small_tokenizer

from mobilellm.artefacts import opening
from mobilellm.artefacts.opening import artefact_directory, open_artefact


@pytest.mark.parametrize(
    ("marker", "package", "extra"),
    [("genai_config.json", "onnxruntime", "onnx"), ("model.pte", "executorch", "executorch")],
)
def test_a_missing_runtime_is_named(
    marker: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tokenizer().save(tmp_path)
    assert artefact_directory(tmp_path) is None
    (tmp_path / marker).write_bytes(b"")
    assert artefact_directory(tmp_path) == tmp_path
    monkeypatch.setattr(opening, "missing_packages", lambda *names: list(names))
    with pytest.raises(ImportError, match=rf"only {package} runs it, which is not installed.*{extra}\W+$"):
        open_artefact(tmp_path)


def test_a_program_may_be_named_itself(tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"")
    assert artefact_directory(tmp_path / "model.pte") == tmp_path
    assert artefact_directory(tmp_path / "other.pte") is None
