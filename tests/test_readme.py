"""The commands and snippets of the README run, in its order, on a tiny quickstart."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import task_rows

pytestmark = pytest.mark.slow  # the snippets use what the commands left

_README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


NEEDED = {"--to onnx": "onnxruntime_genai", "--to executorch": "executorch"}
"""Toolchains that are no part of the tests' installation; their commands run where they are there."""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _README, flags=re.DOTALL)


def _commands() -> list[str]:
    """Every `mobilellm …` line but those that download, from the Hub or the npm registry (tests/serve/test_web.py)."""
    lines = [
        line for block in _blocks("console") for line in block.splitlines() if line.startswith("mobilellm ")
    ]
    absent = [option for option, package in NEEDED.items() if importlib.util.find_spec(package) is None]
    return [
        line for line in lines if not any(part in line for part in ("facebook/", "mobilellm web", *absent))
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    _run(folder, ["mobilellm", "quickstart", "--steps", "6", "--text", str(small_text)])
    (folder / "texts").mkdir()
    for number, part in enumerate(small_text.read_text("utf-8").split("\n\n\n")):
        (folder / "texts" / f"{number}.txt").write_text(part, "utf-8")
    (folder / "wiki.test.raw").write_text(small_text.read_text("utf-8")[:20_000], "utf-8")
    (folder / "conversations.jsonl").write_text("".join(map(_conversation, range(60))), "utf-8")
    (folder / "calls.jsonl").write_text("".join(map(_call, range(60))), "utf-8")
    task_rows.write(folder / "zeroshot", {name: task_rows.local(name) for name in task_rows.HUB})
    return folder


def _conversation(number: int) -> str:
    asked = {"role": "user", "content": f"What comes after {number}?"}
    return json.dumps({"messages": [asked, {"role": "assistant", "content": f"{number + 1}."}]}) + "\n"


def _call(number: int) -> str:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    call = {"type": "function", "function": {"name": "square", "arguments": {"n": number}}}
    messages = [
        {"role": "user", "content": f"Square {number}."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(number**2)},
        {"role": "assistant", "content": f"It is {number**2}."},
    ]
    tools = [{"type": "function", "function": {"name": "square", "parameters": parameters}}]
    return json.dumps({"messages": messages, "tools": tools}) + "\n"


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
    "--out runs/chat": "--out runs/chat --steps 3 --batch.tokens-per-step 1024",
    "--out runs/lora": "--out runs/lora --steps 3 --batch.tokens-per-step 1024",
    "--out runs/distilled": "--out runs/distilled --steps 2 --batch.tokens-per-step 1024 --schedule.warmup-steps 1",
    "--out runs/in-4-bits": "--out runs/in-4-bits --steps 2 --batch.tokens-per-step 1024 --schedule.warmup-steps 1",
    "eval chat": "eval chat --max-tokens 8 --no-cache",
    "eval tools": "eval tools --max-tokens 8 --no-cache",
}


def test_commands(workplace: Path) -> None:
    for line in _commands():
        for published, smaller in SMALLER.items():
            line = line.replace(published, smaller)  # noqa: PLW2901
        if line.startswith("mobilellm serve"):
            _serve(workplace, [*shlex.split(line), "--port", "0"])
        elif line != "mobilellm quickstart":  # run by the fixture, smaller
            printed = _run(workplace, shlex.split(line))
            # What a model of a few steps answers is drawn at random, and may be nothing but its stop.
            assert printed.endswith("\n") if line.startswith("mobilellm chat") else printed.strip(), line


def test_snippets(workplace: Path) -> None:
    for block in _blocks("python"):
        assert _run(workplace, [sys.executable, "-c", block]).strip(), block


def _run(folder: Path, command: list[str]) -> str:
    if command[0] == "mobilellm":
        command = [sys.executable, "-m", "mobilellm", *command[1:]]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, input="Hello\n",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _serve(folder: Path, command: list[str]) -> None:
    """It says where it listens, answers there, and ends with Ctrl-C."""
    server = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = re.search(r"http://\S+", server.stderr.readline())
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}/health", timeout=300) as answer:
            assert json.load(answer)["status"] == "ok"
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130  # interrupted, as with every verb
    finally:
        server.kill()
        server.wait()
