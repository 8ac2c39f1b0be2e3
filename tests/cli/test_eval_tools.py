"""`mobilellm eval tools`: from the command line to tables and records, with a tiny model of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_baselines
from leaderboard_files import IRRELEVANCE, write, write_all

from mobilellm.cli.main import _main

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TALK = {
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_baselines.make("mobilellm-shared", tmp_path_factory.mktemp("models") / "ours")


@pytest.fixture(scope="module")
def bfcl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("bfcl"))


def tools(*arguments: object) -> int:
    return _main(["eval", "tools", *map(str, arguments), "--max-tokens", "4"])


def test_one_model(model: Path, bfcl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, answers = tmp_path / "record.json", tmp_path / "answers.jsonl"
    flags = ("--data", bfcl, "--json", record, "--answers", answers, "--cache", tmp_path / "cache")
    assert tools(model, *flags) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith(("simple ", "live"))] == [
        ["simple", "3"], ["live_irrelevance", "1"]
    ]  # fmt: skip
    assert "it was asked by this package's own" in shown
    numbers: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    assert numbers["kind"] == "tools"
    assert numbers["results"]["irrelevance"]["questions"] == 1
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines][:4] == [*(f"simple_python_{n}" for n in range(3)), "parallel_0"]
    assert numbers["scored"] > 0
    assert tools(model, *flags) == 0  # answers were kept
    again = json.loads(record.read_text(encoding="utf-8"))
    assert (again["scored"], again["cached"]) == (0, numbers["scored"])
    assert again["results"] == numbers["results"]
    capsys.readouterr()
    assert tools(model, *flags[:2], *flags[-2:], "--answers", "-") == 0  # in place of the table
    assert capsys.readouterr().out == answers.read_text(encoding="utf-8")


def test_two_models_side_by_side(
    model: Path, bfcl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_baselines.make("llama", tmp_path / "llama")
    out = tmp_path / "records"
    flags = ("--limit", 1, "--no-cache", "--json", out, "--data", bfcl / "BFCL_v4_irrelevance.json")
    assert tools(model, other, *flags) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["%", str(model), str(other)]
    assert shown[2].split()[0] == "irrelevance"
    assert len(list(out.iterdir())) == 2


def test_one_conversation_and_none(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one, a share of calls has Wilson's interval of one question, a mean of ROUGE has none."""
    file = write(tmp_path / "talk.jsonl", [TALK])
    assert tools(model, "--no-cache", "--data", file) == 0
    shown = capsys.readouterr().out.splitlines()
    (call,) = [line.split() for line in shown if line.startswith("exact match of the whole call")]
    assert call[-3:] == ["1", "0.0", "0.0–79.3"]
    (rouge,) = [line.split() for line in shown if line.startswith("ROUGE-1")]
    assert rouge[-1] == "–"
    assert any(line.startswith("conversations: 1;") for line in shown)
    file.write_text("")
    assert tools(model, "--no-cache", "--data", file) == 2
    assert capsys.readouterr().err == f"mobilellm: error: {file}: holds no conversation (empty)\n"


def test_refused(model: Path, bfcl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = write(tmp_path / "BFCL_v4_simple_python.json", [{**IRRELEVANCE[0], "id": "simple_0"}])
    for arguments, complaint in (
        ((), "tools: no model is named"),
        ((model,), "tools: --data names no file of questions"),
        ((model, "--data", alone), "its official answers are missing"),
        ((model, "--data", tmp_path / "none"), "no such file or folder of questions"),
        ((model, "--data", bfcl, "--limit", 0), "--limit 0 must be at least 1"),
        ((model, "--data", bfcl, "--held-out", 0.5), "--held-out 0.5 is of files of conversations"),
        ((model, model, "--data", bfcl), "two models would be written"),
        ((tmp_path, "--data", bfcl), "config.json"),
    ):
        assert tools(*arguments) == 2, complaint
        captured = capsys.readouterr()
        assert complaint in captured.err
        assert len(captured.err.strip().splitlines()) == 1


def test_records_compared(
    model: Path, bfcl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", bfcl / "BFCL_v4_simple_python.json", "--no-cache", "--json")
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        assert tools(model, *data, path) == 0
    capsys.readouterr()
    assert _main(["eval", "compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[-3:] for line in shown.splitlines() if line.startswith("simple")] == [
        ["0", "3", "1.000"]
    ]
    assert "Paired: both models on the same questions and turns" in shown
