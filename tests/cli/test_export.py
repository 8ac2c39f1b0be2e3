"""`mobilellm export`, and what other commands do with the file: `generate`, `eval ppl`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import SHAPE, saved, shared

from mobilellm.cli.main import _main
from mobilellm.gguf import read_gguf

from .refusals import refusal


@pytest.fixture(scope="module", params=["plain", "shared"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "model"
    saved(directory, shared("immediate", 2) if request.param == "shared" else SHAPE)
    return directory


def test_a_file_says_what_it_holds(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert (
        _main(["export", str(model), str(out), "--type", "q4_0", "--embedding-type", "q8_0", "--json"]) == 0
    )
    described = json.loads(capsys.readouterr().out)
    is_shared = read_gguf(out).metadata["general.architecture"] == "mobilellm"
    assert is_shared == (model.parent.name.startswith("shared"))
    assert described["bytes"] == out.stat().st_size
    assert described["verified"]
    assert described["report"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert set(read_gguf(out).bytes_by_type) == {"F32", "Q4_0", "Q8_0"}
    assert _main(["export", str(model), str(tmp_path / "n.gguf")]) == 0
    assert ("llama.cpp refuses it" in capsys.readouterr().out) == is_shared


def test_generate_gives_the_text_of_the_model_in_torch(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert _main(["export", str(model), str(out), "--type", "f32"]) == 0
    capsys.readouterr()
    texts = []
    for source in (model, out):
        assert _main(["generate", str(source), "some words", "--max-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_perplexity_of_the_file_is_that_of_the_model(model: Path, tmp_path: Path, kind: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to read, and some more words of all kinds\n" * 30, encoding="utf-8")
    out = tmp_path / "m.gguf"
    assert _main(["export", str(model), str(out), "--type", kind]) == 0
    found = []
    for source in (model, out):
        record = tmp_path / "record.json"
        command = ["eval", "ppl", str(source), "--data", str(text), "--no-cache", "--json", str(record)]
        assert _main(command) == 0
        found.append(json.loads(record.read_text(encoding="utf-8")))
    torch, file = (record["results"]["text.txt"]["nats"] for record in found)
    assert file == pytest.approx(torch, rel=1e-3 if kind == "f32" else 2e-2)
    assert found[1]["model"]["backend"].startswith("runtime (")
    assert found[1]["model"]["dtype"] == ("F32" if kind == "f32" else "Q8_0+F32")
    assert found[1]["model"]["parameters"] == found[0]["model"]["parameters"]


def test_rows_that_blocks_do_not_divide_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    saved(tmp_path / "model", replace(SHAPE, intermediate_size=172))
    assert _main(["export", str(tmp_path / "model"), str(tmp_path / "m.gguf")]) == 0
    printed = capsys.readouterr().out
    assert (
        "blk.0.ffn_down.weight and 2 more are stored as F16: rows of 172 are no multiple of Q8_0's 32"
        in printed
    )
    assert _main(["generate", str(tmp_path / "m.gguf"), "some", "--max-tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "MODEL", "m.bin"], "m.bin: does not tell what to write; name a target: --to"),
        (["export", "MODEL", "m.bin", "--to", "gguf"], "must end in .gguf"),
        (["export", "MODEL", "m", "--to", "tflite"], "--to 'tflite' is not a target; choose one of"),
        (
            ["export", "MODEL", "m", "--to", "hf", "--embedding-type", "f16"],
            "--embedding-type f16 does not go",
        ),
        (["export", "MODEL", "m.gguf", "--type", "q9"], "--type 'q9' is not known; choose one of"),
        (["export", "nowhere", "m.gguf"], "nowhere: no such directory"),
        (["generate", "there.gguf", "x"], "there.gguf: is no GGUF file"),
        (
            ["generate", "there.gguf", "x", "--dtype", "float32"],
            "--dtype float32 does not go with there.gguf",
        ),
        (["generate", "MODEL", "x", "--threads", "2"], "--threads 2 is for .gguf files"),
        (["generate", "nowhere.gguf", "x"], "nowhere.gguf: No such file"),
        (
            ["eval", "ppl", "there.gguf", "--backend", "transformers"],
            "--backend transformers does not go with",
        ),
        (["export", "MODEL", "there.gguf"], "there.gguf: exists; choose another name or pass --overwrite"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_text("this is text, not a model at all")
    assert message in refusal(capsys, *(model if each == "MODEL" else each for each in arguments))
    assert Path("there.gguf").read_text() == "this is text, not a model at all"


def test_generating_from_a_file_needs_no_torch(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert _main(["export", str(model), str(out)]) == 0
    code = (
        f"import sys; from mobilellm.cli.main import _main; _main(['generate', {str(out)!r}, 'some', '--max-tokens', '2']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
