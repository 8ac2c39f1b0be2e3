"""One model for all: the files that other runtimes are given hold the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import SHAPE, exported, saved, shared

import mobilellm
from mobilellm.bench.entries import entries, write_directory, write_unrolled
from mobilellm.gguf import read_gguf
from mobilellm.gguf_model import read_config, read_weight
from mobilellm.gguf_tokenizer import read_tokenizer
from mobilellm.runtime import reference

TOKENS = np.arange(3, 60)


def ignore(what: str) -> None:
    pass


@pytest.mark.parametrize("order", ["immediate", "all-over", "reverse"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_an_unrolled_file_is_a_plain_one_that_computes_the_same(
    tmp_path: Path, order: str, kind: str
) -> None:
    file, _ = exported(tmp_path, kind, shared(order, 2))
    plain = tmp_path / "plain.gguf"
    write_unrolled(file, plain)
    assert read_gguf(plain).metadata["general.architecture"] == "llama"
    found = [reference.load(path) for path in (file, plain)]
    states = [model.forward(TOKENS, model.new_cache()) for model in found]
    np.testing.assert_array_equal(*states)
    assert read_tokenizer(read_gguf(plain)).pieces == read_tokenizer(read_gguf(file)).pieces


def test_a_file_with_foreign_rounding_is_not_unrolled(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "Q4_0", shared("immediate", 2))
    raw = bytearray(file.read_bytes())
    start = read_gguf(file).tensors["blk.1.ffn_up.weight"].offset
    raw[start + 2 : start + 18] = bytes([0x77] * 16)  # a block without the -8 that our rounding makes
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="'blk.1.ffn_up.weight' cannot be written again bit for bit"):
        write_unrolled(file, tmp_path / "plain.gguf")


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_directory_holds_the_weights_of_the_file(tmp_path: Path, kind: str) -> None:
    file, model = exported(tmp_path, kind)
    dtype = write_directory(file, tmp_path / "again")
    again = mobilellm.load(tmp_path / "again").model
    assert str(again.head_weight.dtype) == f"torch.{dtype}"
    if kind == "F32":
        assert dtype == "float32"
        for name, weight in model.named_parameters():
            assert torch.equal(weight, again.get_parameter(name)), name
    opened = read_gguf(file)
    config = read_config(opened)
    for name, weight in again.named_parameters():
        expected = torch.tensor(read_weight(opened, config, name)).to(weight.dtype)
        assert torch.equal(expected, weight), name


def test_who_takes_part(tmp_path: Path) -> None:
    file, _ = exported(tmp_path / "a", "Q8_0", shared("immediate", 2))
    saved(tmp_path / "b", SHAPE)
    (tmp_path / "c").mkdir()
    said: list[str] = []
    models = [str(file), "test:F32", str(tmp_path / "b")]
    found = entries(models, ["llama.cpp", "transformers"], tmp_path / "c", said.append)
    dtype = found[2].label.rpartition(" ")[2]  # the processor decides
    assert [(entry.model, entry.label) for entry in found] == [
        (models[0], "mobilellm"),
        (models[0], "llama.cpp, unrolled"),
        (models[0], f"transformers, unrolled, {dtype}"),
        ("test:F32", "mobilellm"),
        ("test:F32", "llama.cpp"),
        ("test:F32", "transformers, float32"),
        (models[2], "mobilellm torch"),
        (models[2], "transformers"),
    ]
    assert [entry.context for entry in found] == [96, 96, 96, 128, 128, 128, 96, 96]
    assert found[4].source == found[3].source
    assert [each.is_ours for each in found] == [True, False, False, True, False, False, True, False]
    assert said[0] == f"{file} shares blocks, which no other runtime reads: it is written unrolled for them"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for number, (model, message) in enumerate(
        [
            ("nowhere.gguf", "nowhere.gguf: no such file"),
            ("nowhere", "'nowhere' is no file; for random weights"),
            (__file__, f"{__file__}: is no .gguf file; name one, a model directory, or a shape"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            entries([model], [], tmp_path / str(number), ignore)


def test_a_run_stands_for_its_model_and_no_name_for_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "model", SHAPE)
    (tmp_path / "made").mkdir()
    entry = entries([str(tmp_path / "run")], [], tmp_path / "made", ignore)[0]
    assert (entry.source, entry.runtime) == (tmp_path / "run" / "model", "mobilellm torch")
    assert entry.context == SHAPE.max_position_embeddings
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="'' names no model"):
        entries([""], [], tmp_path / "other", ignore)


@pytest.mark.parametrize(
    ("marker", "label"), [("model.pte", "executorch"), ("genai_config.json", "onnxruntime")]
)
def test_artefacts_for_other_runtimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, label: str
) -> None:
    from mobilellm.bench import entries as module

    directory = tmp_path / "artefact"
    directory.mkdir()
    (directory / marker).write_text("{}")
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    monkeypatch.setattr(module, "missing_packages", lambda *names: [])
    for name in "ab":
        (tmp_path / name).mkdir()
    (entry,) = entries([str(directory)], ["transformers"], tmp_path / "a", ignore)
    assert (entry.label, entry.context, entry.is_ours) == (label, 77, False)
    monkeypatch.setattr(module, "missing_packages", lambda *names: list(names))
    with pytest.raises(ModuleNotFoundError, match=label):
        entries([str(directory)], [], tmp_path / "b", ignore)
