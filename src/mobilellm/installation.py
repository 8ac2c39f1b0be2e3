"""What to type on this very installation: to call the command, and to add what an extra brings."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
    """The pip command for an extra, from where this installation came.

    From a checkout, or a directory that was installed, it keeps to the versions of constraints.txt.
    """
    pip = f"{_shown(Path(sys.executable))} -m pip install"
    source, editable = Path(__file__).resolve().parents[2], "-e "
    if not _is_checkout(source):
        url, editable = _installed_from(), ""
        source = Path(unquote(urlsplit(url).path))
        if not url.startswith("file://") or not _is_checkout(source):
            return f'{pip} "mobilellm[{extra}]{f" @ {url}" if url else ""}"'
    if source == Path.cwd().resolve():
        return f'{pip} -c constraints.txt {editable}".[{extra}]"'
    constraints = shlex.quote(str(source / "constraints.txt"))
    return f"{pip} -c {constraints} {editable}{shlex.quote(f'{source}[{extra}]')}"


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


def _is_checkout(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("constraints.txt", "pyproject.toml"))


def _installed_from() -> str:
    """The URL that pip was given where it was no name of an index (PEP 610); "" if it was one."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import, and seldom needed

    try:
        recorded = json.loads(distribution("mobilellm").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    url = str(recorded.get("url", ""))
    version_control = recorded.get("vcs_info")
    if version_control:
        return f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    is_gone = url.startswith("file://") and not Path(unquote(urlsplit(url).path)).exists()
    return "" if is_gone else url


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _shown(path: Path) -> str:
    """Quoted for a shell, and short where it lies below the current directory."""
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))
