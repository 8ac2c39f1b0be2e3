"""A model to measure: a .gguf file that is there, or one of random weights."""

from __future__ import annotations

from pathlib import Path

from mobilellm.runtime.random_model import shape_and_type, write_random_model


def gguf_file(name: str, folder: str) -> Path:
    """The file of that name; else SHAPE:TYPE, e.g. 125m:Q8_0, written to `folder` with random weights."""
    file = Path(name)
    if not file.is_file():
        file = Path(folder) / "model.gguf"
        write_random_model(file, *shape_and_type(name))
    return file
