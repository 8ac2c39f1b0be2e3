"""A directory for ONNX Runtime or ExecuTorch as an evaluation sees it: scored as a .gguf file is."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from mobilellm.accounting import stored_parameters
from mobilellm.artefacts.opening import open_artefact
from mobilellm.eval.interface import ModelIdentity
from mobilellm.eval.runtime_model import GgufModel


class ArtefactModel(GgufModel):
    """A `LanguageModel`; made by `artefact_language_model`."""

    @cached_property
    def identity(self) -> ModelIdentity:
        """The fingerprint is over the names and SHA-256 of the directory's files."""
        engine: Any = self._model.engine
        files = sorted(file for file in self._path.rglob("*") if file.is_file())
        whole = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            whole.update(f"{file.relative_to(self._path).as_posix()}\0{digest}\n".encode())
        return ModelIdentity(
            name=str(self._path),
            backend=engine.backend,
            dtype=engine.types,
            device="cpu",
            fingerprint=whole.hexdigest(),
            parameters=stored_parameters(engine.config).total,
            bytes=engine.file.stat().st_size,
            config=dataclasses.asdict(engine.config),
        )


def artefact_language_model(directory: Path) -> ArtefactModel:
    """Raises what `open_artefact` raises."""
    return ArtefactModel(open_artefact(directory), directory)
