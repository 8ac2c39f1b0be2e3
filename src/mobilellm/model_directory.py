"""Model directories: what one is known by, which one a training run stands for, what else may lie in it."""

from __future__ import annotations

import json
from pathlib import Path

from mobilellm.atomic import foreign_file
from mobilellm.config import ConfigError
from mobilellm.layouts import MODEL_TYPES, ConfigFile, parse_config

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
"""By which a directory is known as an adapter, in peft's format."""
_CONFIG_OF_RUN = f"model/{CONFIG}"
_ADAPTER_OF_RUN = f"adapter/{ADAPTER_CONFIG}"

_OF_ONNX = "transformers.js_config"
"""Stands in the config.json of an export to ONNX, whose layers are executed steps, and of some models."""

LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
"""Patterns of the files that say what one may do with a model."""
_MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "configuration_mobilellm.py", "modeling_mobilellm.py", "README.md", ".gitattributes",
    "quantized.safetensors", "quantization.json",
    ".cache/huggingface/*",  # what a download by huggingface_hub leaves behind
    *LICENCE_FILES,
)  # fmt: skip


def model_in(path: Path) -> Path:
    """What a directory stands for: of a training run the model in it, else its adapter; else itself.

    Raises FileNotFoundError for a run that has neither yet.
    """
    if (path / CONFIG).exists():
        return path
    for file in (path / _CONFIG_OF_RUN, path / _ADAPTER_OF_RUN):
        if file.exists():
            return file.parent
    if (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{path}: a training run that has no model yet; go on with the command that started it, and stop "
            "it with one Ctrl-C if you want the model so far"
        )
    return path


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file()


def read_config_file(path: str | Path) -> ConfigFile:
    """Read a config.json, or the config.json of a directory. Raises FileNotFoundError or ConfigError."""
    path = Path(path)
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        if is_adapter(path):
            raise FileNotFoundError(
                f"{path}: is an adapter, not a whole model; make one with: mobilellm merge {path} --out DIR"
            )
        raise FileNotFoundError(f"{path}: no config.json there; {_models_in(path)}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(values).__name__}")
    if _OF_ONNX in values and file.with_name("onnx").is_dir() and not any(file.parent.glob("*.safetensors")):
        raise ConfigError(
            f"{file}: belongs to an export to ONNX, which generate, chat, serve and eval run when its own "
            "directory is named; all else takes the model it was made of"
        )
    return parse_config(values, str(file))


def not_a_model_directory(path: Path) -> str:
    """What shows that a directory is not just a model in a known layout, in words, or "".

    For who is about to replace it: everything in it must be what a model directory holds.
    """
    file = path / CONFIG
    if not file.is_file():
        return "holds other things than a model (there is no config.json)"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("model_type") not in MODEL_TYPES:
        return f"its config.json is not that of a model in a known layout ({', '.join(MODEL_TYPES)})"
    foreign = foreign_file(path, _MODEL_FILES)
    return f"holds {foreign}, which is not part of a model" if foreign else ""


def _models_in(path: Path) -> str:
    """What to name in place of a directory that holds no model itself."""
    below = sorted(path.iterdir()) if path.is_dir() else []
    places = (CONFIG, _CONFIG_OF_RUN)
    models = [each.name for each in below if any((each / place).is_file() for place in places)]
    return f"name one of the models in it: {', '.join(models[:8])}" if models else "name a model directory"
