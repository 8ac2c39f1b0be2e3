"""Running a .gguf file on a CPU, without torch: `mobilellm.runtime.load("model.gguf")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm.runtime.session import RuntimeModel as RuntimeModel
    from mobilellm.runtime.session import load as load

__all__ = ["RuntimeModel", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mobilellm.runtime' has no attribute {name!r}")
    from mobilellm.runtime import session

    return getattr(session, name)
