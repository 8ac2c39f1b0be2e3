"""`mobilellm convert`: the same model in another layout, the source untouched, nothing lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mobilellm
from mobilellm.cli.main import _main
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from tokenizer_oracles import trained

from .refusals import refusal

TOKENS = torch.tensor([[1, 300, 400, 500, 5, 6, 7]])


pytestmark = pytest.mark.usefixtures("one_thread")


def save(directory: Path, name: str = "test-ls", **changes: Any) -> Path:
    config = replace(preset(name), vocab_size=700, **changes)
    checkpoint.save(directory, MobileLLM(config, torch.Generator().manual_seed(1)), trained())
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source")


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def converted(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What --json says; stderr goes under "said"."""
    assert _main(["convert", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    return {**json.loads(captured.out), "said": captured.err}


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return mobilellm.load(directory).model(TOKENS)


def test_to_mobilellm_and_back_again(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    before, target = contents(source), source.parent / "target"
    done = converted(capsys, source, target, "--to", "mobilellm")
    assert done == {
        "source": str(source),
        "destination": str(target),
        "layout": "mobilellm",
        "dtype": "float32",
        "parameters": sum(p.numel() for p in mobilellm.load(source).model.parameters()),
        "stored blocks": 2,
        "executed steps": 4,
        "tokens": 700,
        "repairs": [],
        "licence": None,
        "said": "",
    }
    assert torch.equal(logits(target), logits(source))
    assert contents(source) == before
    assert {name: data for name, (data, _) in contents(target).items()} == {
        name: data for name, (data, _) in before.items()
    }
    assert sorted(path.name for path in source.parent.iterdir()) == ["source", "target"]


@pytest.mark.slow
def test_unrolled_to_llama(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    """The shared blocks stand there as often as they are run; stock transformers says the same."""
    target = source.parent / "llama"
    done = converted(capsys, source, target, "--to", "llama", "--unroll")
    assert (done["stored blocks"], done["executed steps"]) == (4, 4)
    assert done["said"] == "mobilellm: unrolled: 2 stored blocks become 4\n"
    assert torch.allclose(logits(target), logits(source), atol=1e-5)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    original = safetensors.torch.load_file(source / "model.safetensors")
    for step, stored in enumerate((0, 0, 1, 1)):
        name = "self_attn.q_proj.weight"
        assert torch.equal(tensors[f"model.layers.{step}.{name}"], original[f"model.layers.{stored}.{name}"])
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(target)
    assert type(stock).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.allclose(stock(TOKENS).logits, logits(source), atol=1e-4)


def test_an_ordinary_model_needs_no_unrolling(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = save(tmp_path / "source", "test")
    plain = converted(capsys, source, tmp_path / "plain", "--to", "llama")
    unrolled = converted(capsys, source, tmp_path / "unrolled", "--to", "llama", "--unroll")
    assert plain["said"] == unrolled["said"] == ""
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "unrolled")]
    assert weights[0] == weights[1] == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(capsys: pytest.CaptureFixture[str], source: Path, dtype: str) -> None:
    target = source.parent / "target"
    done = converted(capsys, source, target, "--to", "mobilellm", "--dtype", dtype)
    assert done["dtype"] == dtype
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(source / "model.safetensors").items():
        assert tensors[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensors[name], tensor.to(getattr(torch, dtype)))
    again = converted(capsys, target, source.parent / "again", "--to", "mobilellm")
    assert again["dtype"] == dtype  # the stored one is kept, float16 too
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype


def test_what_was_repaired_is_told(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    """The embedding under the name of the head, as automatic conversions leave it."""
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.torch.save_file(tensors, file)
    before = contents(source)
    done = converted(capsys, source, source.parent / "target", "--to", "mobilellm")
    (repair,) = done["repairs"]
    assert "model.embed_tokens.weight was missing" in repair
    assert done["said"] == f"mobilellm: {source}: repaired: {repair}\n"
    assert contents(source) == before
    clean = converted(capsys, source.parent / "target", source.parent / "again", "--to", "mobilellm")
    assert (clean["repairs"], clean["said"]) == ([], "")


def test_a_repair_is_told_once(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.torch.save_file(tensors, file)
    assert _main(["convert", str(source), str(source.parent / "target"), "--to", "mobilellm"]) == 0
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("embed_tokens.weight was missing") == 1


CARD = """---
language: en
license: other
license_name: "a-licence-1.0"
---
# A model card
license: this line is text
"""


@pytest.mark.parametrize(
    ("files", "stated"),
    [
        ({"README.md": "---\nlicense: cc-by-nc-4.0\ntags:\n- x\n---\ntext"}, "cc-by-nc-4.0"),
        ({"README.md": CARD, "LICENSE": "text"}, "a-licence-1.0"),
        ({"README.md": "license: x\n", "LICENSE.md": "text", "NOTICE": "n"}, "in LICENSE.md, NOTICE"),
        ({"README.md": "no head"}, None),
    ],
)
def test_the_licence_is_carried_along(
    capsys: pytest.CaptureFixture[str], source: Path, files: dict[str, str], stated: str | None
) -> None:
    for name, text in files.items():
        (source / name).write_text(text)
    target = source.parent / "target"
    assert converted(capsys, source, target, "--to", "mobilellm")["licence"] == stated
    for name, text in files.items():
        assert (target / name).read_text() == text
    again = source.parent / "again"
    assert _main(["convert", str(target), str(again), "--to", "mobilellm"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("licence"))
    assert row.split(maxsplit=1)[1].startswith(f"{stated or 'not stated by the source'}; what holds for it")
    assert sorted(contents(again)) == sorted(contents(source))


def test_a_run_and_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(tmp_path / "run" / "model")
    assert _main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "mobilellm"]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["source"] == str(tmp_path / "run")
    assert (rows["layout"], rows["stored blocks"], rows["repaired"]) == ("mobilellm", "2", "nothing")
    assert rows["licence"] == "not stated by the source; what holds for it holds for the result"


def test_without_a_tokenizer(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    for file in source.glob("*token*"):
        file.unlink()
    done = converted(capsys, source, source.parent / "target", "--to", "mobilellm")
    assert done["tokens"] is None
    assert done["said"] == f"mobilellm: {source}: has no tokenizer, so the result has none\n"
    assert torch.equal(logits(source.parent / "target"), logits(source))


# Nothing is lost


def test_a_destination_that_exists(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    target = save(source.parent / "target", "test")
    before = contents(target)
    assert f"{target}: exists and is not empty" in refusal(
        capsys, "convert", source, target, "--to", "mobilellm"
    )
    assert contents(target) == before
    converted(capsys, source, target, "--to", "mobilellm", "--overwrite")
    assert sorted(contents(target)) == sorted(contents(source))
    assert torch.equal(logits(target), logits(source))
    assert sorted(path.name for path in source.parent.iterdir()) == ["source", "target"]


def test_what_is_no_model_is_not_overwritten(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    """A folder of photographs is not a model that someone wants replaced, whatever was typed."""
    target = source.parent / "target"
    target.mkdir()
    (target / "mine").write_text("precious")
    for overwrite in ((), ("--overwrite",)):
        assert str(target) in refusal(capsys, "convert", source, target, "--to", "mobilellm", *overwrite)
        assert (target / "mine").read_text() == "precious"


@pytest.mark.parametrize("foreign", ["thesis.txt", "src/main.py", ".git/HEAD", "model-notes.md"])
def test_a_model_directory_with_foreign_files_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], source: Path, foreign: str
) -> None:
    target = save(source.parent / "target", "test")
    (target / foreign).parent.mkdir(exist_ok=True)
    (target / foreign).write_text("precious")
    before = contents(target)
    said = refusal(capsys, "convert", source, target, "--to", "mobilellm", "--overwrite")
    assert f"{target}: holds {foreign}, which is not part of a model" in said
    assert contents(target) == before


@pytest.mark.parametrize("config", ["{}", '{"model_type": "gpt2"}', "not JSON", "[]"])
def test_a_project_with_some_config_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], source: Path, config: str
) -> None:
    """A config.json alone makes no model directory: many programs call their settings so."""
    target = source.parent / "target"
    target.mkdir()
    (target / "config.json").write_text(config)
    (target / "README.md").write_text("my program")
    before = contents(target)
    assert f"{target}: its config.json" in refusal(
        capsys, "convert", source, target, "--to", "mobilellm", "--overwrite"
    )
    assert contents(target) == before


def test_what_official_directories_hold_may_be_overwritten(
    capsys: pytest.CaptureFixture[str], source: Path
) -> None:
    target = save(source.parent / "target", "test")
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "pytorch_model.bin",
        ".cache/huggingface/x/y.lock",
    ):
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        (target / name).write_text("")
    converted(capsys, source, target, "--to", "mobilellm", "--overwrite")
    assert torch.equal(logits(target), logits(source))


def test_an_empty_destination_will_do(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    (source.parent / "target").mkdir()
    converted(capsys, source, source.parent / "target", "--to", "mobilellm")
    assert torch.equal(logits(source.parent / "target"), logits(source))


def test_a_model_may_replace_itself(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    expected = logits(source)
    assert "exists and is not empty" in refusal(
        capsys, "convert", source, source, "--to", "llama", "--unroll"
    )
    converted(capsys, source, source, "--to", "llama", "--unroll", "--overwrite")
    assert torch.allclose(logits(source), expected, atol=1e-5)
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_failure_changes_nothing(
    capsys: pytest.CaptureFixture[str], source: Path, overwrite: tuple[str, ...]
) -> None:
    target = save(source.parent / "target", "test")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    before = contents(target), contents(source)
    refusal(capsys, "convert", source, target, "--to", "mobilellm", *overwrite)
    assert (contents(target), contents(source)) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["source", "target"]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_destination(source: Path) -> None:
    target = save(source.parent / "target", "test")
    before = contents(target)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    command = [sys.executable, "-c", f"from mobilellm.cli.main import main\n{limit}\nmain()"]
    done = subprocess.run(
        [*command, "convert", str(source), str(target), "--to", "mobilellm", "--overwrite"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mobilellm: error: {target}: ")
    assert "File too large" in line
    assert contents(target) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--to"),
        (("--to", "gguf"), "--to 'gguf' must be llama or mobilellm"),
        (("--to", "llama"), "cannot share layers (repeats = 2); use 'mobilellm', or --unroll"),
        (("--to", "mobilellm", "--dtype", "int4"), "--dtype 'int4' is not known"),
        (("--to", "mobilellm", "--nonsense"), "convert: --nonsense is not known"),
    ],
    ids=str,
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], source: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, "convert", source, source.parent / "target", *arguments)
    assert list(source.parent.iterdir()) == [source]


def test_bad_places(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    to = ("--to", "mobilellm")
    nowhere = source.parent / "no" / "where"
    assert f"{nowhere}: no such directory" in refusal(
        capsys, "convert", nowhere, source.parent / "target", *to
    )
    assert "no config.json" in refusal(capsys, "convert", source.parent, source.parent / "target", *to)
    file = source / "config.json"
    assert f"{file}: is a file; name a directory" in refusal(capsys, "convert", source, file, *to)
    assert str(file) in refusal(capsys, "convert", source, file / "inside", *to)
    assert "DST" in refusal(capsys, "convert", source, *to)
    assert list(source.parent.iterdir()) == [source]
