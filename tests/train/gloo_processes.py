"""A file run as several processes, as torchrun would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_spread(
    script: str, size: int, folder: Path, environment: dict[str, str], seconds: float
) -> list[Any]:
    """What each of `size` processes of `script FOLDER` left in FOLDER/RANK.json, by rank; all must succeed."""
    common = os.environ | environment | {"WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder)],
            env=common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
