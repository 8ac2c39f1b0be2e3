"""`mobilellm data show`: what is learnt is marked, what is left out is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_data import records, tokenizer, written

from absent_packages import without
from mobilellm.chat_template import DEFAULT
from mobilellm.cli.main import _main

from .refusals import refusal

GOOD = {
    "messages": [{"role": "user", "content": "why </s> not"}, {"role": "assistant", "content": "the sea"}]
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer().save(tmp_path / "tokenizer")
    written(tmp_path / "talks.jsonl", [{"text": "x"}, GOOD, *records(4)])
    return tmp_path


def shown(folder: Path, *flags: str) -> int:
    command = ["data", "show", str(folder / "talks.jsonl"), "--tokenizer", str(folder / "tokenizer"), *flags]
    return _main(command)


def test_in_a_pipe_what_is_learnt_stands_between_marks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(folder, "-n", "1", "--left-out") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{folder / 'talks.jsonl'}, line 2: ")
    assert "\n<s> user\nwhy </s> not</s> assistant\n«the sea</s>»\n\n" in said
    assert "\n5 of 6 records are conversations to learn from\n" in said
    assert "left out: 1 unknown shape\n" in said
    assert f"{folder / 'talks.jsonl'}, line 1: unknown shape: its keys are text\n" in said


def test_what_is_left_out_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(folder, "-n", "1") == 0
    assert "left out: 1 unknown shape (--left-out lists them)\n" in capsys.readouterr().out


def test_on_a_terminal_it_is_green_and_harmless(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"prompt": "a \x1b[2J", "completion": "the sea"}
    written(folder / "talks.jsonl", [hostile])
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert shown(folder) == 0
    said = capsys.readouterr().out
    assert "\x1b[32mthe sea</s>\x1b[0m" in said
    assert "\x1b[2J" not in said
    assert "a ␛[2J" in said


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(folder, "-n", "2", "--skip", "1", "--json", "--sequence-length", "60") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["conversations"] + sum(found["left_out"].values()) == 6
    assert found["longest"] <= 61
    for example in found["examples"]:
        assert len(example["tokens"]) == len(example["trained"]) <= 61
        assert "".join(part["text"] for part in example["parts"]) == tokenizer().decode(
            example["tokens"], skip_special=False
        )
    assert found["examples"][0]["line"] > 2


def test_json_where_the_output_is_not_unicode(folder: Path) -> None:
    """What ASCII lacks is escaped as JSON has it, not as Python has."""
    written(folder / "talks.jsonl", [{"prompt": "é 🙂", "completion": "the sea"}])
    words = ["data", "show", str(folder / "talks.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "mobilellm", *words],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    (example,) = json.loads(done.stdout)["examples"]
    assert "é 🙂" in "".join(part["text"] for part in example["parts"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["show", "x.jsonl"], "give --model, whose tokenizer and template are used, or --tokenizer"),
        (["show", "--tokenizer", "x"], "name at least one file of conversations"),
        (["hide", "x.jsonl"], "needs the word show or batch first"),
        (["show", "absent.jsonl", "--tokenizer", "TOKENIZER"], "absent.jsonl: no such file of conversations"),
        (["show", "x", "--tokenizer", "TOKENIZER", "-n", "-1"], "-1 must be 0 or above"),
    ],
)
def test_refusals(folder: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "tokenizer") if flag == "TOKENIZER" else flag for flag in flags]
    assert words in refusal(capsys, "data", *arguments)


def test_a_model_is_looked_at_without_torch(folder: Path) -> None:
    """Its tokenizer and its template are all that is read, of a run as of a directory."""
    model = folder / "run" / "model"
    (folder / "tokenizer").rename(folder / "model")
    (folder / "run").mkdir()
    (folder / "model").rename(model)
    (model / "config.json").write_text("{}")
    own = DEFAULT.replace("message.role ~ '", "message.role ~ ':").replace("'assistant", "'assistant:")
    (model / "chat_template.jinja").write_text(own)
    words = ["data", "show", str(folder / "talks.jsonl"), "--model", str(folder / "run"), "-n", "1"]
    script = without("torch", "transformers") + f"from mobilellm.cli.main import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "</s> assistant:\n«the sea</s>»" in done.stdout
