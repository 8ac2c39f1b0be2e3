"""Running a .gguf file on a CPU, without torch: `mobilellm.runtime.load("model.gguf")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm.runtime.batch import ContinuousBatch as ContinuousBatch
    from mobilellm.runtime.batch import Request as Request
    from mobilellm.runtime.decoding import Decoding as Decoding
    from mobilellm.runtime.session import RuntimeModel as RuntimeModel
    from mobilellm.runtime.session import Session as Session
    from mobilellm.runtime.session import load as load

_HOME = {
    "ContinuousBatch": "mobilellm.runtime.batch",
    "Request": "mobilellm.runtime.batch",
    "Decoding": "mobilellm.runtime.decoding",
    "RuntimeModel": "mobilellm.runtime.session",
    "Session": "mobilellm.runtime.session",
    "load": "mobilellm.runtime.session",
}

__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mobilellm.runtime' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
