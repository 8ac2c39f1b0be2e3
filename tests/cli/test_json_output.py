"""`--json` of every verb: exactly one object on standard output, whatever progress is shown; nothing if it fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import task_rows
from gguf_files import SHAPE, random_model, saved, small_tokenizer

from mobilellm.cli.main import VERBS, _main
from mobilellm.data.documents import Document
from mobilellm.data.shards import write_shards
from mobilellm.model import checkpoint

_TALKS = [
    {"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three", "four")
]
_TRAINING = (
    "--model.preset test --steps 2 --evaluate-every 1 --checkpoint.every 1 "
    "--batch.tokens-per-step 128 --batch.sequence-length 32 --batch.micro-batch 4 --sample.prompts some "
    "--sample.tokens 2 --device cpu --log.no-tensorboard --schedule.warmup-steps 1"
)
_TUNING = (
    "--steps 2 --evaluate-every 1 --checkpoint.every 1 --batch.tokens-per-step 96 --batch.sequence-length 96 "
    "--batch.micro-batch 1 --sample.tokens 2 --device cpu --log.no-tensorboard --schedule.warmup-steps 1"
)
COMMANDS = {
    "tokenizer": "tokenizer train SPACE/text.txt --vocab-size 340 --out OUT --json",
    "prepare": "prepare SPACE/text.txt --split-on-blank-lines --tokenizer SPACE/model --out OUT --workers 1 --json",
    "shards info": "shards info SPACE/shards --json",
    "shards verify": "shards verify SPACE/shards --json",
    "shards import": "shards import SPACE/reference --tokenizer SPACE/model --out OUT --held-out 0.3 --json",
    "shards merge": "shards merge SPACE/shards --out OUT --json",
    "shards export": "shards export SPACE/shards OUT --nodes 1 --sequence-length 32 --json",
    "train --plan": f"train tiny-cpu --data.train SPACE/shards --out OUT {_TRAINING} --plan --json",
    "train": f"train tiny-cpu --data.train SPACE/shards --out OUT {_TRAINING} --json",
    "finetune": f"finetune SPACE/model --chat.train SPACE/talks.json --out OUT {_TUNING} --json",
    "merge": "merge SPACE/lora --out OUT --json",
    "data": "data show SPACE/talks.json --model SPACE/model --json",
    "report": "report SPACE/run --out OUT --json",
    "report artefacts": "report artefacts SPACE/artefacts --out OUT --rounds 1 --json",
    "info": "info SPACE/model --json",
    "info of a file": "info SPACE/model.gguf --json",
    "cost": "cost 125m --json",
    "generate": "generate SPACE/model.gguf some words --max-tokens 2 --json",
    "generate in torch": "generate SPACE/model some words --max-tokens 2 --json",
    "chat": "chat SPACE/model.gguf --message some --max-tokens 2 --json",
    "eval ppl": "eval ppl SPACE/model --data SPACE/text.txt --no-cache --json -",
    "eval zero-shot": "eval zero-shot SPACE/model --data-dir SPACE/tasks --tasks arc_easy,piqa --no-cache --json -",
    "eval tools": "eval tools SPACE/model --data SPACE/calls.json --max-tokens 2 --no-cache --json -",
    "eval chat": "eval chat SPACE/model SPACE/model.gguf --data SPACE/talks.json --max-tokens 2 --no-cache --json -",
    "eval table": "eval table --size 125m --json -",
    "eval compare": "eval compare SPACE/a.json SPACE/b.json --json",
    "convert": "convert SPACE/model OUT --to llama --json",
    "quantize": "quantize SPACE/model OUT --eval-data SPACE/text.txt --eval-tokens 64 --json",
    "export": "export SPACE/model OUT.gguf --tokens 64 --json",
    "verify": "verify SPACE/model.gguf --against SPACE/model --tokens 64 --json",
    "bench decode": "bench decode SPACE/model.gguf --tokens 2 --depths 4 --rounds 1 --threads 1 --json -",
    "bench prefill": "bench prefill SPACE/model.gguf --prompts 4 --rounds 1 --threads 1 --json -",
    "bench load": "bench load SPACE/model.gguf --rounds 1 --json -",
    "bench threads": "bench threads SPACE/model.gguf --rounds 1 --json -",
    "web": "web SPACE/model OUT --type fp32 --json",
}
_WITHOUT = {"quickstart", "serve"}
"""They print no object: the one keeps its numbers in the run's folder, the other answers until it is stopped."""
_NEEDED = {
    "merge": "peft",
    "eval zero-shot": "lm_eval",
    "web": "onnxruntime",
    "report artefacts": "matplotlib",
}
"""Packages of an extra."""
_SLOW = {"report artefacts", "bench load", "web"}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its .gguf file, text, shards, conversations, a run of two steps, two records."""
    folder = tmp_path_factory.mktemp("space")
    saved(folder / "model", SHAPE)
    text = "\n\n".join(topics[name] for name in sorted(topics))[:6_000]
    (folder / "text.txt").write_text(text)
    documents = [Document("t", text[start : start + 300]) for start in range(0, len(text), 300)]
    write_shards(folder / "shards", documents, small_tokenizer(), "here", "mine", 0.2)
    (folder / "talks.json").write_text(json.dumps(_TALKS))
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    (folder / "calls.json").write_text(json.dumps([{"tools": tools, "messages": messages}]))
    for command in (
        "export SPACE/model SPACE/model.gguf --tokens 64",
        COMMANDS["train"].replace("OUT", "SPACE/run"),
        "eval ppl SPACE/model --data SPACE/text.txt --no-cache --json SPACE/a.json",
        "eval ppl SPACE/model --data SPACE/text.txt --no-cache --json SPACE/b.json",
        "shards export SPACE/shards SPACE/reference --nodes 1 --sequence-length 32",
        "export SPACE/model SPACE/artefacts/model.gguf --tokens 64",
    ):
        assert _main(command.replace("SPACE", str(folder)).split()) == 0
    task_rows.write(folder / "tasks", {name: task_rows.local(name) for name in ("arc_easy", "piqa")})
    return folder


@pytest.fixture
def needed(name: str, space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only one of the commands wants: an extra, an adapter, packages of a browser."""
    if name in _NEEDED:
        pytest.importorskip(_NEEDED[name], reason="needs an extra")
    if name == "merge":
        command = COMMANDS["finetune"].replace("OUT", "SPACE/lora") + " --lora.rank 2"
        assert _main(command.replace("SPACE", str(space)).split()) == 0
    if name == "web":
        monkeypatch.setattr("mobilellm.serve.web.folder.files_of", lambda package, progress: {})


@pytest.fixture(autouse=True)
def on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is one, so that progress is live; standard output is a pipe."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_every_verb_is_here() -> None:
    assert {name.split()[0] for name in COMMANDS} | _WITHOUT == set(VERBS)


@pytest.mark.usefixtures("one_thread", "needed")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in COMMANDS]
)
def test_one_object(name: str, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name].replace("OUT", str(tmp_path / "out")).replace("SPACE", str(space))
    capsys.readouterr()
    assert _main(command.split()) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert isinstance(json.loads(printed), dict)
    assert printed.endswith("}\n")


@pytest.mark.parametrize(
    "name", [name for name, words in COMMANDS.items() if "SPACE" in words and "--plan" not in words]
)
def test_nothing_where_it_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason is a line on standard error."""
    if name in _NEEDED:
        pytest.importorskip(_NEEDED[name], reason="needs an extra")
    command = COMMANDS[name].replace("OUT", str(tmp_path / "out")).replace("SPACE", str(tmp_path / "gone"))
    assert _main(command.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "mobilellm: error: " in shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        "eval ppl SPACE/model --data SPACE/text.txt --json OUT/r.json",
        "eval chat SPACE/model --data SPACE/talks.json --json OUT/r.json",
        "eval chat SPACE/model --data SPACE/talks.json --sheet OUT/r.html",
        "eval tools SPACE/model --data SPACE/calls.json --answers OUT/r.jsonl",
        "bench decode SPACE/model.gguf --json OUT/r.json",
        "quantize SPACE/model OUT/q --method gptq",
        "export SPACE/model OUT/m.gguf",
        "chat SPACE/model.gguf --message some --save OUT/c.json",
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(
    words: str,
    space: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    command = words.replace("OUT", str(tmp_path)).replace("SPACE", str(space)).split()
    assert _main(command) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    path = next(each for each in command if each.startswith(str(tmp_path)))
    assert shown.err == f"mobilellm: error: {path}: Permission denied\n"


@pytest.mark.parametrize(
    "words",
    [
        "bench decode SPACE/model.gguf --json OUT",
        "eval ppl SPACE/model --data SPACE/text.txt --json OUT",
        "eval table SPACE/model --json OUT",
        "eval chat SPACE/model --data SPACE/talks.json --sheet OUT",
    ],
)
def test_a_folder_in_place_of_a_file_is_told_before_the_work(
    words: str,
    space: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words.replace("OUT", str(tmp_path)).replace("SPACE", str(space)).split()
    assert _main(command) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"mobilellm: error: {tmp_path}: is a folder; name a file in it\n"


def test_a_failed_comparison_is_a_result(
    space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a failure of the command: the object tells it, and the exit code is 1."""
    checkpoint.save(tmp_path / "other", random_model(SHAPE, 1), small_tokenizer())
    command = f"verify {space}/model.gguf --against {tmp_path}/other --tokens 64 --json"
    assert _main(command.split()) == 1
    assert json.loads(capsys.readouterr().out)["verified"] is False
