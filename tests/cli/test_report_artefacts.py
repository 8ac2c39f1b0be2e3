"""`mobilellm report artefacts`: one model in its formats."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from mobilellm.cli.main import _main
from mobilellm.export.export import export
from mobilellm.export.targets import KINDS, Options
from mobilellm.export.verify import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from gguf_files import SHAPE, saved

SETTINGS = Settings(tokens=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("artefacts")
    saved(base / "model", SHAPE)
    for kind in ("q8_0", "q4_0"):
        export(base / "model", base / "out" / f"m-{kind}.gguf", KINDS["gguf"], Options(kind), SETTINGS)
    export(base / "model", base / "out" / "unproven.gguf", KINDS["gguf"], Options(), compare=False)
    shutil.copy(base / "out" / "m-q8_0.gguf", base / "out" / "copied.gguf")
    return base / "out"


def test_a_table_of_what_was_verified(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["report", "artefacts", str(folder), "--out", str(tmp_path / "r"), "--rounds", "1"]
    assert _main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert "copied.gguf: left out, it has no report" in printed.err
    assert "unproven.gguf.unverified: left out, it is not verified" in printed.err
    assert [row["name"] for row in told["artefacts"]] == ["m-q4_0.gguf", "m-q8_0.gguf"]
    small, large = told["artefacts"]
    assert small["bytes"] == (folder / "m-q4_0.gguf").stat().st_size < large["bytes"]
    report = json.loads((folder / "m-q4_0.gguf.verify.json").read_text())
    assert small["perplexity"] == report["fidelity"]["engine"]["perplexity"]
    assert small["kl"] > large["kl"] > 0
    for row in (small, large):
        assert row["tokens_per_second"] > 1
        assert 0 < row["first_token_seconds"] < 60
        assert row["peak_bytes"] > 10_000_000
        assert row["accuracy"] is None
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "artefacts.json", "artefacts.md", "artefacts.png",
    ]  # fmt: skip
    page = (tmp_path / "r" / "artefacts.md").read_text()
    assert f"| m-q4_0.gguf | gguf | Q4_0 | {small['bytes'] / 1e6:.1f} |" in page
    assert (tmp_path / "r" / "artefacts.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty")], "holds no verified artefact"),
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(folder), "--limit", "3"], "--limit 3 is of the zero-shot tasks; add --data-dir"),
        ([str(folder), "--rounds", "0"], "--rounds 0 must be at least 1"),
    ):
        assert _main(["report", "artefacts", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_artefacts_of_two_models_are_no_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "both")
    saved(tmp_path / "other", SHAPE, seed=1)
    export(tmp_path / "other", tmp_path / "both" / "other.gguf", KINDS["gguf"], Options(), SETTINGS)
    assert _main(["report", "artefacts", str(tmp_path / "both")]) == 2
    assert "holds artefacts of several models" in capsys.readouterr().err
