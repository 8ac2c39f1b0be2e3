"""`mobilellm report artefacts`: one model in its formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf_files import SHAPE, saved

from mobilellm.cli import report_artefacts
from mobilellm.cli.main import _main
from mobilellm.export import speed
from mobilellm.export.engine_runtime import engine_runtime
from mobilellm.export.export import export
from mobilellm.export.targets import KINDS, Options
from mobilellm.export.verify import Settings

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
    assert f"| m-q4_0.gguf | gguf | Q4_0 | rtn | {small['bytes'] / 1e6:.1f} |" in page
    assert (tmp_path / "r" / "artefacts.png").read_bytes()[:4] == b"\x89PNG"


def test_artefacts_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The medians count, and one that fails in a later round is told once and left out."""
    rates = {"a": [1.0, 9.0, 2.0], "b": [4.0, 4.0, 5.0], "c": [1.0]}
    asked: list[str] = []

    def measure(opener: object, context: int, path: Path) -> speed.Speed:
        assert context == 7
        asked.append(path.name)
        if not rates[path.name]:
            raise ValueError("gone")
        rate = rates[path.name].pop(0)
        return speed.Speed("r", 1 / rate, rate, round(rate))

    monkeypatch.setattr(speed, "measure", measure)
    told: list[str] = []
    artefacts = {tmp_path / name: (engine_runtime, 7) for name in rates}
    found = speed.measure_in_turns(artefacts, 3, lambda path, error: told.append(f"{path.name}: {error}"))
    assert "".join(asked) == "abcabcab"
    assert told == ["c: gone"]
    assert {path.name: each for path, each in found.items()} == {
        "a": speed.Speed("r", 0.5, 2.0, 2), "b": speed.Speed("r", 0.25, 4.0, 4),
    }  # fmt: skip


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


def test_what_was_quantised_from_a_model_is_in_its_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_artefacts, "_speeds", lambda *given: {})
    out = tmp_path / "all"
    shutil.copytree(folder, out)
    text = tmp_path / "text.txt"
    text.write_text("some words to read, and more of them\n" * 40)
    quantize = ["quantize", str(folder.parent / "model"), "--scheme", "q4_0", "--eval-tokens", "0"]
    calibrated = ["--method", "gptq", "--calibration", str(text)]
    for name, flags in (("directory", []), ("directly.gguf", calibrated)):
        assert _main([*quantize[:2], str(out / name), *quantize[2:], *flags]) == 0
    export = ["export", str(out / "directory"), str(out / "by-directory.gguf"), "--tokens", "96"]
    assert _main(export) == 0
    shown = capsys.readouterr()
    said = shown.out
    assert (
        f"comparing with {folder.parent / 'model'}, too, of which {out / 'directory'} was made" in shown.err
    )
    assert _main(["report", "artefacts", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in told["artefacts"]}
    assert {name: row["quantized_by"] for name, row in rows.items()} == {
        "m-q4_0.gguf": "rtn", "m-q8_0.gguf": "rtn", "by-directory.gguf": "rtn", "directly.gguf": "gptq",
    }  # fmt: skip
    # To the nearest it is the same whether it is exported or quantised, and so is what that cost.
    assert rows["by-directory.gguf"]["kl"] == pytest.approx(rows["m-q4_0.gguf"]["kl"], rel=1e-3)
    assert rows["directly.gguf"]["kl"] > 0
    assert f"KL from the origin  {rows['by-directory.gguf']['kl']:.2g} nats a token" in said
    report = json.loads((out / "by-directory.gguf.verify.json").read_text())
    described = json.loads((out / "directory" / "quantization.json").read_text())
    first = json.loads((out / "m-q4_0.gguf.verify.json").read_text())
    assert report["origin_sha256"] == described["origin"]["sha256"] == told["source_sha256"]
    assert first["origin_sha256"] == first["source_sha256"] == told["source_sha256"]
    assert report["source_sha256"] != told["source_sha256"]
    assert f"rtn, from the model {told['source_sha256'][:12]}…" in said
    assert "KL from the source is not known" not in " ".join(told["notes"])

    # Where the origin has gone it is not known, and can be named.
    description = out / "directory" / "quantization.json"
    origin = str(folder.parent / "model")
    description.write_text(description.read_text().replace(origin, "/nowhere"))
    artefact, against = str(out / "by-directory.gguf"), str(out / "directory")
    verify = ["verify", artefact, "--against", against, "--tokens", "96", "--json"]
    assert _main(verify) == 0
    assert json.loads(capsys.readouterr().out)["report"]["fidelity"]["engine"]["origin_kl"] is None
    assert _main(["report", "artefacts", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "KL from the source is not known: by-directory.gguf. " in " ".join(told["notes"])
    assert _main([*verify, "--origin", origin]) == 0
    known = json.loads(capsys.readouterr().out)["report"]["fidelity"]["engine"]["origin_kl"]
    assert known == rows["by-directory.gguf"]["kl"]
    assert _main([*verify, "--origin", against]) == 2
    assert f"--origin {against} is not the model that {against} was made of" in capsys.readouterr().err
    assert _main(["verify", artefact, "--against", origin, "--origin", origin]) == 2
    assert (
        f"--origin {origin} is for a quantised source; {origin} does not tell what it was made of"
        in capsys.readouterr().err
    )


def test_reports_of_older_versions_are_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_artefacts, "_speeds", lambda *given: {})
    shutil.copytree(folder, tmp_path / "old")
    for file in (tmp_path / "old").glob("*.verify.json"):
        report = json.loads(file.read_text())
        del report["origin_sha256"], report["quantized_by"]
        file.write_text(json.dumps(report))
    assert _main(["report", "artefacts", str(tmp_path / "old"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["quantized_by"], row["kl"] > 0) for row in told["artefacts"]] == [(None, True)] * 2


def test_artefacts_of_two_models_are_no_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "both")
    saved(tmp_path / "other", SHAPE, seed=1)
    export(tmp_path / "other", tmp_path / "both" / "other.gguf", KINDS["gguf"], Options(), SETTINGS)
    assert _main(["report", "artefacts", str(tmp_path / "both")]) == 2
    assert "holds artefacts of several models" in capsys.readouterr().err
