"""ONNX directories: run by onnxruntime and onnxruntime-genai, equal to torch, and spoilt ones caught by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import SHAPE, saved, shared, small_tokenizer

from mobilellm.artefacts.opening import open_artefact
from mobilellm.eval.interface import Request
from mobilellm.eval.models import open_model
from mobilellm.export import to_onnx
from mobilellm.export.export import Exported, export, verify_artefact
from mobilellm.export.targets import KINDS, Options
from mobilellm.export.verify import Settings
from mobilellm.model import checkpoint
from mobilellm.quant.artefact import assemble
from mobilellm.quant.artefact import save as save_quantized
from mobilellm.quant.formats import Q4_0
from mobilellm.quant.schemes import SCHEMES

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxruntime_genai", reason="needs the extra onnx")

SHORT = replace(SHAPE, vocab_size=300, num_layers=2)
SHAPES = {
    "plain": SHORT,
    "untied": replace(SHORT, tie_word_embeddings=False),
    "immediate": shared("immediate", 2, vocab_size=300, num_layers=2),
    "reverse": shared("reverse", 3, vocab_size=300, num_layers=2),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("some words to  read, and some more words of   all kinds\n" * 40, "utf-8")
    return Settings(text=text, tokens=160)


def exported(directory: Path, config: Any, settings: Settings, **options: Any) -> Exported:
    saved(directory / "model", config)
    return export(directory / "model", directory / "out", KINDS["onnx"], Options(**options), settings)


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in (directory / "onnx").iterdir())


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_verified_in_both_runtimes(shape: str, kind: str, settings: Settings, tmp_path: Path) -> None:
    done = exported(tmp_path, SHAPES[shape], settings, type=kind)
    assert done.report is not None
    assert done.report.failed == []
    assert [name.split()[0] for name in done.report.runtimes] == ["onnxruntime-genai", "onnxruntime"]
    assert done.path == tmp_path / "out"


@pytest.mark.parametrize("shape", SHAPES)
def test_float_logits_are_torchs_however_they_are_fed(shape: str, settings: Settings, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", SHAPES[shape])
    done = export(tmp_path / "model", tmp_path / "out", KINDS["onnx"], Options("fp32"), compare=False)
    engine = open_artefact(done.path).engine
    tokens = np.random.default_rng(0).integers(0, 300, 90)
    with torch.inference_mode():
        wanted = model(torch.tensor(tokens)[None])[0].numpy()
    cache = engine.new_cache(90)
    rows = [engine.forward(part, cache) for part in np.split(tokens, [20, 21, 22, 60])]
    np.testing.assert_allclose(np.concatenate(rows), wanted, atol=1e-4)
    cache.truncate(50)
    np.testing.assert_allclose(engine.forward(tokens[50:], cache), wanted[50:], atol=1e-4)
    with pytest.raises(ValueError, match="cannot take 1 more"):
        engine.forward(tokens[:1], cache)


def test_shared_blocks_are_stored_once(settings: Settings, tmp_path: Path) -> None:
    plain = exported(tmp_path / "a", SHAPES["plain"], settings, type="fp32").path
    twice = exported(tmp_path / "b", SHAPES["immediate"], settings, type="fp32").path
    block = sum(p.numel() for p in saved(tmp_path / "c", SHORT).model.layers[0].parameters())
    assert size(twice) - size(plain) < block  # bytes of the graph; another copy would be 8 * block


def test_weights_beside_the_graph(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it has to be from 2 GB on."""
    monkeypatch.setattr(to_onnx, "ONE_FILE", 0)
    done = exported(tmp_path, SHORT, settings)
    assert done.report is not None
    assert done.report.failed == []
    assert (done.path / "onnx" / "model_q4.onnx_data").stat().st_size > 50_000
    described = json.loads((done.path / "config.json").read_text("utf-8"))
    assert described["transformers.js_config"]["use_external_data_format"] == {"model_q4.onnx": 1}


def test_config_counts_the_pairs_of_keys_and_values(settings: Settings, tmp_path: Path) -> None:
    done = exported(tmp_path, SHAPES["reverse"], settings)
    for values in (
        json.loads((done.path / "config.json").read_text("utf-8")),
        json.loads((done.path / "genai_config.json").read_text("utf-8"))["model"]["decoder"],
    ):
        assert values["num_hidden_layers"] == 6


def test_rows_that_32_does_not_divide(settings: Settings, tmp_path: Path) -> None:
    done = exported(tmp_path / "some", replace(SHORT, intermediate_size=100), settings)
    assert "2 matrices are stored as float16: 32 does not divide their rows of 100" in done.notes
    assert done.report is not None
    assert done.report.failed == []
    none = replace(SHORT, hidden_size=40, intermediate_size=100)
    with pytest.raises(
        ValueError, match=r"neither hidden_size = 40 nor intermediate_size = 100; take --type fp32"
    ):
        exported(tmp_path / "none", none, settings)
    assert not list((tmp_path / "none").glob("out*"))


def test_a_quantised_model_keeps_its_codes(settings: Settings, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", SHORT)
    codes = {
        name: Q4_0.quantize(values.detach() * 1.3)  # not what rounding the sums of code * scale would give
        for name, values in model.named_parameters()
        if values.ndim == 2
    }
    quantized = assemble(model, SCHEMES["q4_0"], codes)
    save_quantized(tmp_path / "small", model, quantized, small_tokenizer(), {})
    done = export(tmp_path / "small", tmp_path / "out", KINDS["onnx"], Options(), settings)
    assert done.report is not None
    assert done.report.failed == []
    with pytest.raises(ValueError, match=r"type = int8 would round .* again"):
        export(tmp_path / "small", tmp_path / "again", KINDS["onnx"], Options("int8"), settings)


def test_evaluated_like_its_source(settings: Settings, tmp_path: Path) -> None:
    saved(tmp_path / "model", SHAPES["immediate"])
    done = export(tmp_path / "model", tmp_path / "out", KINDS["onnx"], Options("fp32"), compare=False)
    ours, artefact = open_model(tmp_path / "model"), open_model(done.path)
    requests = [Request((1, 5, 9), (7, 8)), Request((1, 5), (9, 3, 4)), Request((1,), (250,))]
    theirs = dict(artefact.log_likelihoods(requests))
    for number, answer in ours.log_likelihoods(requests):
        np.testing.assert_allclose(theirs[number].tokens, answer.tokens, atol=1e-4)
    prompt = ours.encode(["some words"])
    assert artefact.greedy(prompt, [], 8) == ours.greedy(prompt, [], 8)
    assert artefact.identity.parameters == ours.identity.parameters
    with pytest.raises(ValueError, match="dtype = float32 does not go with"):
        open_model(done.path, dtype="float32")


def change(path: Path, changed: Callable[[Any], None]) -> None:
    file = path / "onnx" / "model_q4.onnx"
    model = onnx.load(str(file))
    changed(model.graph)
    onnx.save_model(model, str(file))


def attribute(graph: Any, node: str, name: str) -> Any:
    (found,) = (node_ for node_ in graph.node if node_.name == node)
    return next(each for each in found.attribute if each.name == name)


def rotary_pairs(path: Path) -> None:
    change(path, lambda graph: setattr(attribute(graph, "step.1.attention", "rotary_interleaved"), "i", 1))


def stale_slot(path: Path) -> None:
    def changed(graph: Any) -> None:
        (node,) = (each for each in graph.node if each.name == "step.1.attention")
        node.input[3] = "past_key_values.0.key"

    change(path, changed)


def swapped_rows(path: Path) -> None:
    def changed(graph: Any) -> None:
        (tensor,) = (each for each in graph.initializer if each.name.endswith("0.mlp.up_proj.weight"))
        values = np.array(onnx.numpy_helper.to_array(tensor))
        tensor.raw_data = values[::-1].tobytes()

    change(path, changed)


def no_stop_token(path: Path) -> None:
    file = path / "genai_config.json"
    values = json.loads(file.read_text("utf-8"))
    values["model"]["eos_token_id"] = 0
    file.write_text(json.dumps(values), "utf-8")


def exchanged_ids(path: Path) -> None:
    file = path / "tokenizer.json"
    values = json.loads(file.read_text("utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["o"], vocabulary["e"] = vocabulary["e"], vocabulary["o"]
    file.write_text(json.dumps(values), "utf-8")


def cut_off(path: Path) -> None:
    file = path / "onnx" / "model_q4.onnx"
    file.write_bytes(file.read_bytes()[:30_000])


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (rotary_pairs, "graph"),
        (stale_slot, "graph"),
        (swapped_rows, "weights"),
        (no_stop_token, "stop token"),
        (exchanged_ids, "tokenizer"),
        (cut_off, "file"),
    ],
)
def test_spoilt_ones_are_caught(
    spoil: Callable[[Path], None], check: str, settings: Settings, tmp_path: Path
) -> None:
    done = exported(tmp_path, SHAPES["immediate"], settings)
    spoil(done.path)
    (tmp_path / "out.verify.json").unlink()
    report = verify_artefact(done.path, tmp_path / "model", settings).report
    assert report is not None
    assert check in report.failed


def test_only_its_own_kind_is_overwritten(settings: Settings, tmp_path: Path) -> None:
    done = exported(tmp_path, SHORT, settings)
    again = export(tmp_path / "model", done.path, KINDS["onnx"], Options("int8"), settings, overwrite=True)
    assert (again.path / "onnx" / "model_int8.onnx").is_file()
    assert not (again.path / "onnx" / "model_q4.onnx").exists()
    shutil.copy(tmp_path / "model" / "model.safetensors", done.path)
    with pytest.raises(FileExistsError, match=r"holds model\.safetensors, which does not belong to it"):
        export(tmp_path / "model", done.path, KINDS["onnx"], Options(), settings, overwrite=True)


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "model", SHORT)
    with pytest.raises(
        ValueError, match=r"type = 'int3' is not known to onnx; choose one of fp32, int8, int4"
    ):
        export(tmp_path / "model", tmp_path / "out", KINDS["onnx"], Options("int3"))
    with pytest.raises(ValueError, match="unroll = True does not go with --to onnx"):
        export(tmp_path / "model", tmp_path / "out", KINDS["onnx"], Options(unroll=True))
    assert checkpoint.read_weights(tmp_path / "model").config == SHORT
