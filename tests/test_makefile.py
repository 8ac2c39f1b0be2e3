"""`make` on machines that are not ready: one clear line, and nothing half made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OLD_PYTHON = f"""#!/bin/sh
exec {sys.executable} -c '
import sys
sys.version_info = (3, 9, 2, "final", 0)
code, sys.argv = sys.argv[2], sys.argv[2:]
exec(code)
' "$@"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip


def executable(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_an_old_python_is_refused(clone: Path, target: str) -> None:
    old = executable(clone / "old python", OLD_PYTHON)
    done = make(clone, target, f"PYTHON={old}")
    assert done.returncode != 0
    assert f"{old} is Python 3.9 and 3.11 or newer is needed" in done.stderr.splitlines()[0]
    assert not (clone / ".venv").exists()


def test_an_old_environment_is_refused(clone: Path) -> None:
    executable(clone / ".venv" / "bin" / "python", OLD_PYTHON)
    done = make(clone, "quickstart")
    assert done.returncode != 0
    assert ".venv is Python 3.9 and 3.11 or newer is needed" in done.stderr.splitlines()[0]


def test_no_python(clone: Path) -> None:
    done = make(clone, "quickstart", "PYTHON=nopython")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("make: nopython: not found; install Python 3.11 or newer")


def test_an_environment_that_cannot_be_made_leaves_none(clone: Path) -> None:
    """As on a Debian without python3-venv, where the interpreter is there and pip is not."""
    broken = executable(
        clone / "python",
        '#!/bin/sh\n[ "$2" = venv ] && mkdir -p .venv/bin && touch .venv/bin/python && exit 1\nexit 0\n',
    )
    done = make(clone, "quickstart", f"PYTHON={broken}")
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_download_is_seen(clone: Path) -> None:
    """What pip says reaches the person who waits for it."""
    python = '#!/bin/sh\ncase "$*" in *install*) echo "pip: $*";; esac\nexit 0\n'
    executable(clone / ".venv" / "bin" / "python", python)
    executable(clone / ".venv" / "bin" / "mobilellm", "#!/bin/sh\necho ran $*\n")
    done = make(clone, "quickstart", "ARGS=--steps 5")
    assert done.returncode == 0, done.stderr
    assert "downloads torch and more, which takes minutes" in done.stdout
    (pip,) = [line for line in done.stdout.splitlines() if line.startswith("pip: ")]
    assert "-c constraints.txt" in pip
    assert "quiet" not in pip
    assert "progress-bar off" not in pip
    assert "ran quickstart --steps 5" in done.stdout
    assert "pip: " not in make(clone, "quickstart").stdout  # the second time
