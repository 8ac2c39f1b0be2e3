"""Where this package keeps what it could make again: compiled libraries, answers of evaluations."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`mobilellm` in $XDG_CACHE_HOME, or in ~/.cache. The XDG standard has a relative path there ignored."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "mobilellm"
