"""`mobilellm info`: what it prints, for whom, and what it refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mobilellm.cli.main import _main
from mobilellm.layouts import config_json
from mobilellm.presets import PUBLISHED, preset
from mobilellm.runtime.random_model import write_random_model

from .refusals import refusal


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _main(["info", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def write_config(directory: Path, name: str = "test-ls", **changes: object) -> Path:
    directory.mkdir(parents=True)
    values = config_json(preset(name), "mobilellm", "float16") | changes
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_the_card_s_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys).splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.startswith(PUBLISHED)}
    assert tuple(rows) == PUBLISHED
    assert rows["125m"] == "30 9 3 576 1,536 124,635,456 2,048 3:1 yes no 249.3 23,040 0.320"
    assert rows["1.5b"] == "54 25 5 1,600 4,352 1,511,188,800 2,048 5:1 yes no 3,022.4 69,120 3.376"
    assert rows["ls-350m"].endswith("yes 2x immediate 690.7 81,920 1.572")
    for count in ("345,355,200", "603,188,352", "1,005,461,760"):
        assert count in "\n".join(lines)


def test_a_gguf_file_is_described_like_its_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "small.gguf"
    write_random_model(file, "test-ls", "Q8_0")
    directory = write_config(tmp_path / "model")
    of_the_file = json.loads(output(capsys, str(file), "--json"))["models"][0]
    of_the_model = json.loads(output(capsys, str(directory), "--json"))["models"][0]
    for key in ("executed_layers", "parameters", "kv_cache_bytes_per_token", "flops_per_token"):
        assert of_the_file[key] == of_the_model[key]
    assert of_the_file["model_type"] == "mobilellm in gguf"
    assert f"small.gguf, {file.stat().st_size:,} B" in output(capsys, str(file))


def test_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert "125.0" not in output(capsys, "125m", "350m")
    table = output(capsys, "125m", "350m", "--bits", "8", "--kv-bits", "8")
    row = next(line for line in table.splitlines() if line.startswith("125m"))
    assert row.split()[-3:] == ["124.7", "11,520", "0.320"]
    sheet = output(capsys, "125m", "--bits", "4", "--embedding-bits", "8")
    assert "bytes at 4/8 bits" in sheet
    assert f"{18_432_000 + (26_542_080 + 79_626_240) // 2 + 2 * 35_136:,}" in sheet


def test_json_is_one_object_with_exact_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(output(capsys, "--json", "--bits", "8"))
    models = {model["name"]: model for model in answer["models"]}
    assert tuple(models) == PUBLISHED
    ls = models["ls-125m"]
    assert (
        ls["parameters"]["total"]
        == sum(ls["parameters"][part] for part in ls["parameters"]) // 2
        == 124_635_456
    )
    assert (ls["executed_layers"], ls["kv_cache_bytes_per_token"]) == (60, 46_080)
    assert ls["bytes"]["total"] == 124_635_456 + 35_136
    assert ls["flops_per_token"]["training"] == 3 * ls["flops_per_token"]["forward"]
    assert ls["flops_per_token"]["training_6n"] == 6 * (2 * (26_542_080 + 79_626_240) + 18_432_000)
    assert ls["config"] == preset("ls-125m").to_dict()
    (one,) = json.loads(output(capsys, "--json", "tiny"))["models"]
    assert one["name"] == "tiny"


def test_a_model_directory_its_config_and_its_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = write_config(tmp_path / "run" / "model", tie_word_embeddings=False, share_embedding=True)
    (model / "model.safetensors").write_bytes(b"x" * 1000)
    (model / "tokenizer.json").write_bytes(b"{}")
    for path in (model, model / "config.json", tmp_path / "run"):
        sheet = output(capsys, str(path))
        assert "117,056" in sheet
        assert "2 stored, 4 executed (2x immediate)" in sheet
        assert "the head is tied to the embedding" in sheet  # the repair
        assert "model.safetensors, 1,000 B (0.07 bits a parameter)" in sheet
        assert "tokenizer.json" not in sheet
    (record,) = json.loads(output(capsys, "--json", str(model)))["models"]
    assert (record["path"], record["model_type"]) == (str(model), "mobilellm")
    assert record["files"] == {"model.safetensors": 1000}
    assert len(record["repairs"]) == 1
    assert "the head is tied" in output(capsys, str(model), "125m")  # under a table too


def test_a_preset_wins_over_a_directory_of_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path / "125m", "test-ls")
    monkeypatch.chdir(tmp_path)
    assert "124,635,456" in output(capsys, "125m")
    assert "117,056" in output(capsys, "./125m")


def test_brackets_in_a_path_are_not_markup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "[bold]x" in output(capsys, str(write_config(tmp_path / "[bold]x")))


def test_refuses_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'126m' is neither a preset (125m, 350m" in refusal(capsys, "info", "126m")
    assert "'' is neither a preset (125m, 350m" in refusal(capsys, "info", "")
    assert "no/such/place" in refusal(capsys, "info", "no/such/place")
    assert "no config.json there" in refusal(capsys, "info", str(tmp_path))
    (tmp_path / "notes.txt").write_text("words")
    assert "notes.txt: is no model; name a model directory" in refusal(
        capsys, "info", str(tmp_path / "notes.txt")
    )
    (tmp_path / "notes.gguf").write_text("words")
    assert "notes.gguf: is no GGUF file" in refusal(capsys, "info", str(tmp_path / "notes.gguf"))
    (tmp_path / "bare.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))  # no tensors, no metadata
    assert "bare.gguf: its architecture is None" in refusal(capsys, "info", str(tmp_path / "bare.gguf"))
    broken = write_config(tmp_path / "broken", num_hidden_layers=0)
    assert "layers = 0 must be at least 1" in refusal(capsys, "info", str(broken))
    (broken / "config.json").write_text("{")
    assert "not JSON" in refusal(capsys, "info", str(broken))
    for bits in ("0", "64", "nan", "-3"):
        for flag in ("--bits", "--embedding-bits", "--kv-bits"):
            assert f"error: {flag} {bits} must be between 1 and 32" in refusal(capsys, "info", flag, bits)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_gets_the_whole_table(encoding: str) -> None:
    """Also where the environment says 80 columns, and where the reader cannot show box characters."""
    done = subprocess.run(
        [sys.executable, "-c", "from mobilellm.cli.main import main; main(['info'])"],
        capture_output=True,
        env={**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": encoding},
        timeout=300,
        check=True,
    )
    assert done.stderr == b""
    lines = done.stdout.decode(encoding).splitlines()
    row = next(line for line in lines if line.startswith("ls-125m"))
    assert len(row) > 120
    assert row.rstrip().endswith("0.603")
    assert "124,635,456" in row
    assert "\x1b" not in "".join(lines)


def test_a_narrow_terminal_cuts_between_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    text = output(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    parts = [line for line in text.splitlines() if line.startswith("1.5b")]
    assert len(parts) == 2
    assert "1,511,188,800" in parts[0]
    assert parts[1].split()[-1] == "3.376"
