"""`mobilellm eval chat`: from the command line to tables, records and the sheet, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_baselines

from mobilellm.cli.main import _main

ROWS = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_baselines.make("mobilellm-shared", tmp_path_factory.mktemp("models") / "ours")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def chat(*arguments: object) -> int:
    return _main(["eval", "chat", *map(str, arguments), "--max-tokens", "4", "--no-cache"])


def test_two_models_and_a_sheet(
    model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_baselines.make("llama", tmp_path / "llama")
    out, sheet = tmp_path / "records", tmp_path / "sheet.html"
    flags = ("--data", file, "--json", out, "--sheet", sheet, "--sheet-prompts", 2, "--answered", 3)
    assert chat(model, other, *flags) == 0
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-2:] for line in shown.splitlines()}
    assert rows["conversations"] == ["3", "3"]
    assert "Written:" in shown
    page = sheet.read_text(encoding="utf-8")
    assert page.count("<section>") == 2
    assert page.count("Say one.") == 1
    assert str(other) in page
    results = [
        json.loads(path.read_text(encoding="utf-8"))["results"]["rows.json"] for path in sorted(out.iterdir())
    ]
    assert [result["answered"] for result in results] == [3, 3]
    assert all(f"{result['loss']:.3f}" in shown for result in results)


def test_a_gguf_file(model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = tmp_path / "model.gguf"
    assert _main(["export", str(model), str(gguf), "--type", "f32"]) == 0
    losses = []
    for source in (model, gguf):
        assert chat(source, "--data", file, "--json", tmp_path / "record.json") == 0
        losses.append(json.loads((tmp_path / "record.json").read_text())["results"]["rows.json"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    capsys.readouterr()


def test_a_single_conversation_has_a_loss_and_no_interval(
    model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an empty file nothing can be said at all, which takes one line."""
    record = tmp_path / "record.json"
    assert chat(model, "--data", file, "--limit", 1, "--json", record) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("loss a token")]
    assert line.endswith("(–)")
    assert "a single conversation tells nothing of how sure its loss is: no interval" in shown
    assert "loss_low" not in json.loads(record.read_text())["results"]["rows.json"]
    assert chat(model, "--data", file, "--held-out", 0.01) == 0  # one is held out, as finetune does
    assert "no interval" in capsys.readouterr().out
    assert chat(model, "--data", file) == 0
    assert "no interval" not in capsys.readouterr().out
    file.write_text("[]")
    assert chat(model, "--data", file) == 2
    assert capsys.readouterr().err == f"mobilellm: error: {file}: holds no conversation (empty)\n"


def test_a_page_that_is_printed(
    model: Path,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In place of the table, and no file is called "-"."""
    monkeypatch.chdir(tmp_path)
    assert chat(model, "--data", file, "--sheet", "page.html") == 0
    capsys.readouterr()
    assert chat(model, "--data", file, "--sheet", "-") == 0
    assert capsys.readouterr().out == Path("page.html").read_text(encoding="utf-8")
    assert chat(model, "--data", file, "--sheet", "-", "--json", "-") == 2
    said = "mobilellm: error: --json - and --sheet -: only one can be printed; name a file for the other\n"
    assert tuple(capsys.readouterr()) == ("", said)
    assert not Path("-").exists()


def test_refused(model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    for arguments, complaint in (
        ((), "chat: no model is named"),
        ((model,), "chat: --data names no file of conversations"),
        ((model, "--data", tmp_path / "none.json"), "none.json"),
        ((model, "--data", tmp_path / "text.txt"), "conversations are read from"),
        ((model, "--data", file, "--answered", 0), "--answered 0 must be at least 1"),
        ((model, "--data", file, "--sheet", "x.html", "--sheet-prompts", 0), "--sheet-prompts 0 must be"),
    ):
        assert chat(*arguments) == 2, complaint
        captured = capsys.readouterr()
        assert complaint in captured.err
        assert len(captured.err.strip().splitlines()) == 1
