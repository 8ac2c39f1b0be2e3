"""Which model an argument of `info` or `cost` means: a preset, or one on this machine. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mobilellm.config import ModelConfig
from mobilellm.gguf import read_gguf
from mobilellm.gguf_model import read_config
from mobilellm.model_directory import model_in, read_config_file
from mobilellm.presets import preset, preset_names

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "*.pte", "*.onnx")


@dataclass(frozen=True)
class Subject:
    """A model to report on. Path, layout, repairs and files are those of a directory; a preset has none."""

    name: str
    config: ModelConfig
    path: Path | None = None
    model_type: str | None = None
    repairs: tuple[str, ...] = ()
    files: dict[str, int] = field(default_factory=dict)  # weight file name -> bytes


def find_subject(name: str) -> Subject:
    """A preset of that name, else the model directory, run, config.json or .gguf file there.

    Presets win: write ./tiny for a directory called tiny. Raises FileNotFoundError or ValueError.
    """
    try:
        return Subject(name, preset(name))
    except ValueError:
        pass
    path = Path(name)
    if not name or not path.exists():
        raise FileNotFoundError(
            f"{name!r} is neither a preset ({', '.join(preset_names())}) nor a directory or file here"
        )
    if path.is_file() and path.suffix == ".gguf":
        file = read_gguf(path)
        config = read_config(file)
        kind = f"{file.metadata['general.architecture']} in gguf"
        return Subject(name, config, path, kind, files={path.name: path.stat().st_size})
    if path.is_file() and path.suffix != ".json":
        raise FileNotFoundError(f"{name}: is no model; name a model directory, a run or a .gguf file")
    path = model_in(path) if path.is_dir() else path
    described = read_config_file(path)
    directory = path if path.is_dir() else path.parent
    files = {file.name: file.stat().st_size for pattern in _WEIGHT_FILES for file in directory.glob(pattern)}
    return Subject(
        name, described.config, path, described.model_type, described.repairs, dict(sorted(files.items()))
    )
