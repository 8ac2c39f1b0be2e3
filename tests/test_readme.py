"""The commands and snippets of the README run, in its order, on a tiny quickstart."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "eval"))
import task_rows

pytestmark = pytest.mark.slow  # the snippets use what the commands left

_README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


NEEDED = {"--to onnx": "onnxruntime_genai", "--to executorch": "executorch"}
"""Toolchains that are no part of the tests' installation; their commands run where they are there."""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _README, flags=re.DOTALL)


def _commands() -> list[str]:
    """Every `mobilellm …` line; those that download from the Hub need a network and are left out."""
    lines = [
        line for block in _blocks("console") for line in block.splitlines() if line.startswith("mobilellm ")
    ]
    absent = [option for option, package in NEEDED.items() if importlib.util.find_spec(package) is None]
    return [line for line in lines if not any(part in line for part in ("facebook/", *absent))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    _run(folder, ["mobilellm", "quickstart", "--steps", "6", "--text", str(small_text)])
    (folder / "texts").mkdir()
    for number, part in enumerate(small_text.read_text("utf-8").split("\n\n\n")):
        (folder / "texts" / f"{number}.txt").write_text(part, "utf-8")
    (folder / "wiki.test.raw").write_text(small_text.read_text("utf-8")[:20_000], "utf-8")
    task_rows.write(folder / "zeroshot", {name: task_rows.local(name) for name in task_rows.HUB})
    return folder


def test_there_is_something_to_run() -> None:
    assert len(_commands()) >= 6
    assert len(_blocks("python")) >= 2


SMALLER = {  # the same commands, on less text and in fewer steps
    "--vocab-size 8192": "--vocab-size 512",
    "eval zero-shot": "eval zero-shot --data-dir zeroshot --no-cache",  # without a network
    "eval table 125m=": "eval table --data-dir zeroshot --no-cache 125m=",
    "eval ppl": "eval ppl --no-cache",
    "my-text.txt": "wiki.test.raw",
    "shards --out runs/tiny": "shards --out runs/tiny --steps 4 --batch.tokens-per-step 1024",
}


def test_commands(workplace: Path) -> None:
    for line in _commands():
        for published, smaller in SMALLER.items():
            line = line.replace(published, smaller)  # noqa: PLW2901
        if line != "mobilellm quickstart":  # run by the fixture, smaller
            assert _run(workplace, shlex.split(line)).strip(), line


def test_snippets(workplace: Path) -> None:
    for block in _blocks("python"):
        assert _run(workplace, [sys.executable, "-c", block]).strip(), block


def _run(folder: Path, command: list[str]) -> str:
    if command[0] == "mobilellm":
        command = [sys.executable, "-m", "mobilellm", *command[1:]]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
