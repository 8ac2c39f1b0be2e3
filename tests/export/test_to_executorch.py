"""ExecuTorch programs: equal to torch, whole, quantised and delegated; spoilt ones caught by name.

Lowering takes seconds for every executed step, so what needs a program is slow.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import saved, shared, small_tokenizer
from random_models import random_model

from mobilellm.artefacts.executorch_engine import load_operators
from mobilellm.artefacts.opening import open_artefact
from mobilellm.eval.interface import Request
from mobilellm.eval.models import open_model
from mobilellm.export.export import Exported, export, verify_artefact
from mobilellm.export.source import open_source
from mobilellm.export.static_model import StaticModel
from mobilellm.export.targets import KINDS, Options
from mobilellm.export.to_executorch import TARGET, _matrices
from mobilellm.export.verify import Settings
from mobilellm.model import checkpoint
from mobilellm.model.quantized import packed

pytest.importorskip("executorch", reason="needs the extra executorch")

SHARED = shared("immediate", 2, vocab_size=300, num_layers=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("some words to  read, and some more words of   all kinds\n" * 40, "utf-8")
    return Settings(text=text, tokens=160)


@pytest.mark.parametrize("order", ["immediate", "all-over", "reverse"])
@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_static_model_is_the_model(order: str, kind: str, tmp_path: Path) -> None:
    """Before it is lowered: caches of its own, fed in parts; int4 against the reference arithmetic."""
    load_operators()
    config = shared(order, 2, vocab_size=300, num_layers=2)
    saved(tmp_path, config)
    source = open_source(tmp_path, print)
    options = TARGET.complete(Options(type=kind), source)
    static = StaticModel(
        config, lambda name: source.tensors[name], _matrices(source, options), context=64, chunk=64
    )
    tokens = list(range(5, 65))
    with torch.inference_mode():
        parts = [
            static(torch.tensor([tokens[a:b]]), torch.tensor([a])) for a, b in ((0, 30), (30, 31), (31, 60))
        ]
    found = torch.cat(parts, dim=1)[0].numpy()
    wanted = TARGET.reference(source, options)(tokens)
    off = np.sqrt(np.square(found - wanted).mean() / wanted.var())
    assert off < (1e-5 if kind == "fp32" else 0.05)  # a rounding that tips over moves what follows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that never says a byte by itself: ExecuTorch's runner gives text token by token."""
    directory = tmp_path_factory.mktemp("source") / "model"
    made = random_model(SHARED)
    with torch.no_grad():
        made.model.embed_tokens.weight[:259] *= 1e-3
    checkpoint.save(directory, made, small_tokenizer())
    return directory


@pytest.fixture(scope="module")
def exported(model: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(
        model, tmp_path_factory.mktemp("artefact") / "out", KINDS["executorch"], Options(), settings
    )


@pytest.mark.slow
def test_verified_in_executorch(exported: Exported) -> None:
    report = exported.report
    assert report is not None
    assert report.failed == []
    details = {check.name: check.detail for check in report.checks}
    assert details["weights"] == "8 of 8 quantised, byte for byte"
    assert details["types"] == "1 int8, 7 int4"


@pytest.mark.slow
def test_several_sequences_take_turns(exported: Exported) -> None:
    engine = open_artefact(exported.path).engine
    first, second = engine.new_cache(96), engine.new_cache(96)
    tokens = np.random.default_rng(0).integers(0, 300, 80)
    alone = engine.forward(tokens, first)
    engine.forward(tokens[::-1], second)
    first.truncate(40)
    np.testing.assert_array_equal(engine.forward(tokens[40:41], first)[0], alone[40])
    with pytest.raises(ValueError, match="cannot take 80 more"):
        engine.forward(tokens, first)


@pytest.mark.slow
def test_scored_as_any_model(exported: Exported) -> None:
    artefact = open_model(exported.path / "model.pte")
    requests = [Request((1, 5, 9), (7, 8)), Request((1, 5), (9, 3, 4))]
    answers = dict(artefact.log_likelihoods(requests))
    engine = open_artefact(exported.path).engine
    logits = engine.forward(np.array([1, 5, 9, 7]), engine.new_cache(96)).astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(answers[0].tokens, wanted[[2, 3], [7, 8]], atol=1e-5)
    assert artefact.identity.dtype == "int4+int8"


@pytest.mark.slow
def test_executorchs_own_runner_gives_the_same_text(exported: Exported) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    model = open_artefact(exported.path)
    wanted = model.generate("some words", max_new_tokens=12)[0]
    runner = TextLLMRunner(str(exported.path / "model.pte"), str(exported.path / "tokenizer.json"))
    said = list[str]()
    settings = GenerationConfig(echo=False, max_new_tokens=12, temperature=0.0, num_bos=1)
    runner.generate("some words", settings, said.append)
    assert "".join(said).strip() == wanted.text.strip()


@pytest.mark.slow
def test_spoilt_ones_are_caught(exported: Exported, model: Path, settings: Settings, tmp_path: Path) -> None:
    program = (exported.path / "model.pte").read_bytes()
    source = open_source(model, print)
    codes = _matrices(source, TARGET.complete(Options(), source))("model.embed_tokens.weight").codes
    row = codes[290].numpy().tobytes()
    rows = program.index(row)
    assert rows == program.rindex(row)  # the embedding's rows are the head's in XNNPACK
    down = _matrices(source, TARGET.complete(Options(), source))("model.layers.0.mlp.down_proj.weight")
    multiplied = program.index(packed(down.codes[:2]).numpy().tobytes())
    path = tmp_path / "spoilt"
    shutil.copytree(exported.path, path)
    for spoilt in (
        program[:rows] + bytes(64) + program[rows + 64 :],
        program[:multiplied] + bytes(64) + program[multiplied + 64 :],
        program[: len(program) // 2],
    ):
        (path / "model.pte").write_bytes(spoilt)
        report = verify_artefact(path, model, settings).report
        assert report is not None
        assert {"file", "weights"} & set(report.failed)


def test_bad_wishes_are_refused_before_anything_is_lowered(model: Path, tmp_path: Path) -> None:
    for options, message in (
        (Options(type="q4_0"), r"type = 'q4_0' is not known to executorch; choose one of int4, int8, fp32"),
        (Options(context=400), r"context = 400: must lie in 96 … 96"),
        (Options(unroll=True), "unroll = True does not go with --to executorch"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out", KINDS["executorch"], options)
    assert not list(tmp_path.iterdir())


def test_a_program_of_another_maker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"model\.pte: is no program of ours, or not all of it"):
        TARGET.inventory(tmp_path)
