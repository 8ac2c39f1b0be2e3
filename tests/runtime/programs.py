"""What programs say; what the compiler at hand knows, and one that knows less."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def said(*command: str | Path, **environment: str) -> list[str]:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout.splitlines()


def compiler_knows(flag: str) -> bool:
    command = ["c++", flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def compiler_without(flag: str, folder: Path) -> Path:
    """One in `folder` that refuses the flag, as those that are older do."""
    compiler = folder / "older-c++"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" {flag} "*) echo "unrecognized option {flag}" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    return compiler
