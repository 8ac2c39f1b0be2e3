"""What every benchmark notes beside its numbers, and how it writes them down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobilellm.environment import environment

PACKAGES = ("mobilellm", "torch", "transformers", "tokenizers", "numpy", "lm_eval")


def child(command: list[str], **environment: str) -> dict[str, Any]:
    """Run a process that prints one JSON object on its last line, and return that. Exits if it fails."""
    # GOMP_SPINCOUNT for all contestants: the command line sets it too.
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "10000", **environment}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=surroundings)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def describe() -> dict[str, Any]:
    return {"command": " ".join(["python", *sys.argv]), **environment(PACKAGES)}


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Print results as JSON, and write them to `path` if there is one."""
    text = json.dumps({"machine": describe(), **results}, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
