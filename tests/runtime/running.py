"""Models on either engine for the tests of what stands on both, and the count of what they are fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import SHAPE, exported

import mobilellm.runtime
from mobilellm.config import ModelConfig
from mobilellm.runtime import engine as native
from mobilellm.runtime.session import RuntimeModel

ENGINES = ("reference", "native")


def opened(
    directory: Path, engine: str, config: ModelConfig = SHAPE, kind: str | None = None
) -> RuntimeModel:
    """A random model. Its type is one with blocks where the engine takes sums in one order."""
    if engine == "native" and (fault := native.missing()) is not None:
        pytest.skip(f"the native engine was not compiled: {fault}")
    kind = kind or {"reference": "F32", "native": "Q8_0"}[engine]
    file, _ = exported(directory, kind, config)
    return mobilellm.runtime.load(file, 2 if engine == "native" else None, engine)  # type: ignore[arg-type]


class CountingEngine:
    """An engine that counts the tokens it is fed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.fed = 0
        self.batches: list[list[int]] = []
        """Tokens of each sequence in every pass."""
        self.fault: Exception | None = None
        """Raised by every pass, if given."""

    def forward_batch(self, feeds: Sequence[tuple[np.ndarray, Any]]) -> np.ndarray:
        if self.fault is not None:
            raise self.fault
        self.batches.append([len(tokens) for tokens, _ in feeds])
        self.fed += sum(self.batches[-1])
        return self._engine.forward_batch(feeds)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def counted(model: RuntimeModel) -> tuple[RuntimeModel, CountingEngine]:
    engine = CountingEngine(model.engine)
    return replace(model, engine=engine), engine
