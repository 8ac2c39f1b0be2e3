"""A file run as several processes, as torchrun would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process ended, as subprocess has it (-9: killed), and what it said on stderr."""

    code: int
    said: str


def run_processes(
    script: str, size: int, folder: Path, environment: Mapping[str, str], seconds: float
) -> list[Ended]:
    """`size` processes of `script FOLDER`, by rank; all must end in time."""
    common = os.environ | dict(environment) | {"WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1"}
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
    return [Ended(process.returncode, said) for process, said in zip(processes, errors, strict=True)]


def run_spread(
    script: str, size: int, folder: Path, environment: Mapping[str, str], seconds: float
) -> list[Any]:
    """What each of `size` processes of `script FOLDER` left in FOLDER/RANK.json, by rank; all must succeed."""
    ended = run_processes(script, size, folder, environment, seconds)
    assert [each.code for each in ended] == [0] * size, "\n".join(each.said for each in ended)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
