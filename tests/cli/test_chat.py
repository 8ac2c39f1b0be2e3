"""`mobilellm chat` outside a terminal: the answer and nothing else, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_files import SHAPE, saved

from exported_gguf import export_gguf
from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.cli import chat
from mobilellm.cli.main import _main
from mobilellm.runtime import load
from mobilellm.sampling import Sampling

COMMAND = [sys.executable, "-m", "mobilellm", "chat"]
SAMPLED = ("--temperature", "1", "--seed", "3", "--max-tokens", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, chat.gguf, base.gguf"""
    folder = tmp_path_factory.mktemp("chat")
    saved(folder / "model", SHAPE)
    export_gguf(folder / "model", folder / "base.gguf", "Q8_0")
    (folder / "model" / "chat_template.jinja").write_text(DEFAULT, "utf-8")
    export_gguf(folder / "model", folder / "chat.gguf", "Q8_0")
    return folder


def answers(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert _main(["chat", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _main(["chat", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    line = said.err.splitlines()[-1]
    assert line.startswith("mobilellm: error: ")
    return line


def expected(file: Path, messages: list[dict[str, str]]) -> str:
    model = load(file)
    prompt = ChatTemplate(DEFAULT, model.tokenizer).prompt(messages)
    drawn = model.generate_tokens([prompt], Sampling(temperature=1, seed=3, top_p=0.95), 12)
    ids = [new.token for new in drawn if new.token not in (None, 2)]
    return model.tokenizer.decode([259, *ids]).strip()  # behind another piece no space is taken away


def test_a_pipe_gets_the_answer_alone(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(folder / "chat.gguf"), *SAMPLED], input=b"some words\n", capture_output=True, timeout=300,
        check=True, env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.stderr == b""
    answer = done.stdout.decode()
    wanted = expected(folder / "chat.gguf", [{"role": "user", "content": "some words"}])
    assert answer.strip() in wanted
    assert len(answer.strip()) > 5
    assert answer.endswith("\n")


def test_an_empty_pipe_is_no_message(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(folder / "chat.gguf")], input=b"\n", capture_output=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input is empty; write the message into it, or give --message" in done.stderr


def test_what_is_said_in_a_terminal_may_hold_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an extra's name does in the command that installs it."""
    monkeypatch.setattr("mobilellm.chat.reading.reader", lambda say: say("pip install '.[chat]'"))
    monkeypatch.setattr("mobilellm.chat.terminal.converse", lambda room, *others: None)
    room: Any = None  # nothing is said to it
    chat._converse(room)
    assert "pip install '.[chat]'" in capsys.readouterr().out


def test_json_is_an_object_a_turn(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    asked = ("--system", "be kind", "--message", "some", "--message", "more")
    first, second = answers(capsys, str(folder / "chat.gguf"), *asked, *SAMPLED)
    assert first["is_chat"]
    assert first["message"]["role"] == "assistant"
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert second["usage"]["reused_tokens"] >= first["usage"]["prompt_tokens"]
    assert second["usage"]["context"] == SHAPE.max_position_embeddings
    assert first["finish"] == "length"
    assert first["usage"]["completion_tokens"] == 12
    assert first["timings"]["tokens_per_second"] > 0
    assert first["settings"]["temperature"] == 1
    again = answers(capsys, str(folder / "model"), *asked, "--temperature", "0", "--max-tokens", "4")
    assert again[0]["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]


def test_a_base_model_says_that_it_continues(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    base = str(folder / "base.gguf")
    assert _main(["chat", base, "--message", "some words", "--temperature", "0", "--max-tokens", "8"]) == 0
    said = capsys.readouterr()
    assert "is a base model: it continues the text" in said.err
    completion = load(base).generate("some words", max_new_tokens=8)[0]
    assert said.out == f"{completion.text}\n"
    assert "--system 'x' does not go with" in refusal(capsys, base, "--system", "x", "--message", "y")


def test_a_conversation_is_kept_and_gone_on_with(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    chat, file = str(folder / "chat.gguf"), str(tmp_path / "talk.jsonl")
    (first,) = answers(capsys, chat, "--message", "some", *SAMPLED, "--save", file)
    (second,) = answers(capsys, chat, "--load", file, "--message", "more", *SAMPLED, "--save", file)
    both = answers(capsys, chat, "--message", "some", "--message", "more", *SAMPLED)
    assert [first["message"], second["message"]] == [row["message"] for row in both]
    assert len(json.loads(Path(file).read_text())["messages"]) == 4
    assert "talk.jsonl: exists" in refusal(capsys, chat, "--message", "x", "--save", file)
    assert "nowhere: no such file" in refusal(capsys, chat, "--message", "x", "--load", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "-1"), "--temperature -1.0 must be"),
        (("--max-tokens", "0"), "--max-tokens 0 must be at least 1"),
        (("--context", "roll"), "--context"),
        (("--stop", ""), "a stop string is empty"),
        (("--threads", "0"), "--threads 0 must lie in"),
        (("--message", "words " * 100), "do not fit the model's context of 96; shorten it"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, str], words: str
) -> None:
    chat = str(folder / "chat.gguf")
    assert words in refusal(
        capsys, chat, *arguments, *(() if "--message" in arguments else ("--message", "x"))
    )


def test_a_template_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    saved(tmp_path / "model", SHAPE)
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for")
    assert "not a Jinja template" in refusal(capsys, str(tmp_path / "model"), "--message", "x")


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    read, write = os.pipe()
    asked = [*COMMAND, str(folder / "base.gguf"), "--message", "some", "--max-tokens", "80"]
    with subprocess.Popen(asked, stdout=write, stderr=subprocess.PIPE) as running:
        os.close(write)
        os.close(read)
        assert running.stderr is not None
        assert b"Error" not in running.stderr.read()
        assert running.wait(timeout=300) == 0
