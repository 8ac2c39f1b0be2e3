"""What every benchmark notes beside its numbers, and how it writes them down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mobilellm.environment import environment

PACKAGES = ("mobilellm", "torch", "transformers", "tokenizers", "numpy", "lm_eval")


def describe() -> dict[str, Any]:
    return {"command": " ".join(["python", *sys.argv]), **environment(PACKAGES)}


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Print results as JSON, and write them to `path` if there is one."""
    text = json.dumps({"machine": describe(), **results}, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
