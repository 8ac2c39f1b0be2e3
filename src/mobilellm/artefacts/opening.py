"""A directory for ONNX Runtime or ExecuTorch as a model that reads and writes text, like a .gguf file."""

from __future__ import annotations

from pathlib import Path

from mobilellm.artefacts.onnx_engine import GENAI_CONFIG
from mobilellm.chat_template import stored_template
from mobilellm.installation import install_command, missing_packages
from mobilellm.runtime.session import RuntimeModel
from mobilellm.tokenizer import Tokenizer

PROGRAM = "model.pte"


def artefact_directory(path: str | Path) -> Path | None:
    """The directory of such an artefact, named by itself or by its program; None for anything else."""
    if not str(path):
        return None
    path = Path(path)
    if path.name == PROGRAM and path.is_file():
        return path.parent
    known = any((path / name).is_file() for name in (GENAI_CONFIG, PROGRAM))
    return path if known else None


def open_artefact(directory: Path) -> RuntimeModel:
    """Raises FileNotFoundError or ValueError with one line; ImportError names what to install."""
    tokenizer = Tokenizer.load(directory)
    chat_template = stored_template(directory)
    if (directory / PROGRAM).is_file():
        _check_installed(directory, "executorch", "executorch")
        from mobilellm.artefacts.executorch_engine import ExecutorchModel

        engine = ExecutorchModel(directory / PROGRAM)
        return RuntimeModel(engine, tokenizer, str(directory), chat_template)
    _check_installed(directory, "onnxruntime", "onnx")
    from mobilellm.artefacts.onnx_engine import OnnxModel

    return RuntimeModel(OnnxModel(directory), tokenizer, str(directory), chat_template)


def _check_installed(directory: Path, package: str, extra: str) -> None:
    if missing_packages(package):
        raise ImportError(
            f"{directory}: only {package} runs it, which is not installed; "
            f"install it with: {install_command(extra)}",
            name=package,
        )
