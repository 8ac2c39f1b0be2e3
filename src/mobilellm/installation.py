"""What to type on this very installation: to call the command, and to add what an extra brings."""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

EXTRAS = {
    "torch": "torch", "matplotlib": "plots", "tensorboardX": "train", "transformers": "hf", "pyarrow": "data",
    "zstandard": "data", "datasets": "data", "datasketch": "data", "datatrove": "datatrove",
    "lm_eval": "eval", "gguf": "export", "onnx": "onnx", "onnxruntime": "onnx", "onnxruntime_genai": "onnx",
    "executorch": "executorch", "llama_cpp": "peers", "prompt_toolkit": "chat",
    "peft": "finetune", "trl": "finetune",
    "starlette": "serve", "uvicorn": "serve", "httptools": "serve", "pydantic": "serve",
    "llguidance": "serve", "prometheus_client": "serve",
}  # fmt: skip
"""A package that the base install does without -> the extra that brings it."""

_BROUGHT = {
    "train": {"torch", "matplotlib", "tensorboardX"},
    "finetune": {"torch", "transformers", "peft", "trl", "datasets"},
    "eval": {"torch", "transformers", "matplotlib", "lm_eval", "datasets"},
    "export": {"torch", "gguf"},
    "onnx": {"torch", "onnx", "onnxruntime", "onnxruntime_genai"},
}
"""An extra that a whole verb needs -> those of these packages that it brings."""


def extras_with(package: str, whole: str | None) -> str:
    """What to install for a package, beside or within the extra `whole` that a verb needs in any case."""
    own = EXTRAS[package]
    if whole is None:
        return own
    return whole if package in _BROUGHT[whole] else f"{whole},{own}"


def install_command(extra: str) -> str:
    """The pip command for an extra. From a checkout it keeps to the versions of constraints.txt."""
    pip = f"{_shown(Path(sys.executable))} -m pip install"
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "constraints.txt").is_file() or not (checkout / "pyproject.toml").is_file():
        return f'{pip} "mobilellm[{extra}]"'
    if checkout == Path.cwd().resolve():
        return f'{pip} -c constraints.txt -e ".[{extra}]"'
    constraints = shlex.quote(str(checkout / "constraints.txt"))
    return f"{pip} -c {constraints} -e {shlex.quote(f'{checkout}[{extra}]')}"


def missing_packages(*names: str) -> list[str]:
    """Those that are not installed, found without importing any of them."""
    return [name for name in names if not _is_installed(name)]


def program() -> str:
    """What calls this installation's `mobilellm`: its bare name only where the shell finds that one."""
    script = Path(sys.executable).with_name("mobilellm")
    found = shutil.which("mobilellm")
    if found is not None and script.is_file() and Path(found).resolve() == script.resolve():
        return "mobilellm"
    return _shown(script) if script.is_file() else f"{_shown(Path(sys.executable))} -m mobilellm"


def activation() -> str | None:
    """The command after which the shell finds `mobilellm`; None if it does so already, or nothing would."""
    script = Path(sys.executable).with_name("activate")
    return None if program() == "mobilellm" or not script.is_file() else f"source {_shown(script)}"


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _shown(path: Path) -> str:
    """Quoted for a shell, and short where it lies below the current directory."""
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))
