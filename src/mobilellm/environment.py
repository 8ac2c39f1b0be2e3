"""On what a number was made: date, commit, processor, versions. Goes into every record and benchmark."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_VECTOR_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)
"""Instruction sets that decide how fast a CPU multiplies, by their names in /proc/cpuinfo."""


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Date, commit of this package's checkout, machine, and the versions of `packages`."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def commit() -> str:
    """The commit of the checkout this package runs from, "+changes" where files differ; "unknown" elsewhere.

    Installed into a site-packages inside some other repository, the package is not of that repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / "src" / "mobilellm").is_dir():
        return "unknown"
    head = _git(root, "rev-parse", "--short", "HEAD")
    return head + "+changes" if head != "unknown" and _git(root, "status", "--porcelain") else head


def processor() -> str:
    """The processor's name, and the instruction sets that decide its speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(
        reversed([(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in lines)])
    )
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.machine()
    return f"{name} ({', '.join(each for each in _VECTOR_SETS if each in flags) or 'no vector sets named'})"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
