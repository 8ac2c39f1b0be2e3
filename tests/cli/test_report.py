"""`mobilellm report`: tables, JSON, where the files go, and refusals of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import FACTS, RECIPE, write_run

from mobilellm.cli.main import _main
from mobilellm.report import written

from .refusals import refusal


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert _main(["report", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "x", tail='{"step": 101, "tok')
    text = output(capsys, run)
    assert (run / "report" / "report.html").is_file()
    assert f"Report: {run / 'report' / 'report.html'}" in text
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.split()[1:])
    assert rows["tokens/s"] == "10,000"
    assert rows["steps"] == "100 of 200"
    assert "6N and causal attention" in text
    monkeypatch.setattr(written, "draw", lambda panel, *style, **names: panel.name.encode())
    assert output(capsys, run) == text  # again, over its own files


def test_several_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pictures are looked at in tests/report and drawn by `test_one_run`; here it is the command that counts.
    monkeypatch.setattr(written, "draw", lambda panel, *style, **names: panel.name.encode())
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), facts=FACTS | {"name": "a"})
    write_run(Path("b"), facts=FACTS | {"name": "b"}, recipe=RECIPE.replace("adamw", "muon"))
    text = output(capsys, "a", "b")
    assert Path("report/report.html").is_file()
    assert any(line.split() == ["optim.name", "adamw", "muon"] for line in text.splitlines())
    assert not any(line.startswith("optim.lr") for line in text.splitlines())
    found = json.loads(output(capsys, "a", "b", "--json", "--out", "elsewhere"))
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    assert found["differences"] == {"optim.name": ["adamw", "muon"]}
    assert found["runs"][0]["tokens_per_second"] == pytest.approx(10_000)
    assert all(Path(file).is_file() for file in found["files"])
    assert found["files"][0] == "elsewhere/report.html"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "x")
    assert "no such folder" in refusal(capsys, "report", tmp_path / "nowhere")
    assert "it is no run folder" in refusal(capsys, "report", tmp_path)
    assert "named twice" in refusal(capsys, "report", run, run)
    assert "report:" in refusal(capsys, "report")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").write_text("mine")
    assert "loss.png: is there and no report made it" in refusal(
        capsys, "report", run, "--out", tmp_path / "out"
    )
    said = refusal(capsys, "report", run, "--out", _file(tmp_path / "out.txt"))
    assert "out.txt: is a file; choose another --out" in said


def _file(path: Path) -> Path:
    path.write_text("a file")
    return path


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x")
    script = (
        "import sys\nfrom mobilellm.cli.main import _main\n"
        f"assert _main(['report', {str(run)!r}]) == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, capture_output=True)
