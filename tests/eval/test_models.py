"""What a person types becomes a model in the right hands, or one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import huggingface_hub.constants
import pytest
import tiny_baselines
from tiny_baselines import ROWS, STOCK

from absent_packages import without
from mobilellm.eval.answers import Cached
from mobilellm.eval.interface import Request
from mobilellm.eval.models import open_model
from mobilellm.eval.transformers_model import TransformersModel
from mobilellm.model import checkpoint
from mobilellm.model.api import LoadedModel, load


class InOurCode(NamedTuple):
    loaded: LoadedModel
    tokens_at_once: int | None


@pytest.fixture(autouse=True)
def our_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who is chosen is tested here."""
    module = ModuleType("mobilellm.eval.torch_model")
    module.torch_model = InOurCode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def opened(path: Path | str, **options: object) -> tuple[object, list[str]]:
    said: list[str] = []
    return open_model(path, say=said.append, **options), said  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", STOCK)
def test_other_architectures_go_to_transformers(architecture: str, tmp_path: Path) -> None:
    path = tiny_baselines.make(architecture, tmp_path / "m")
    model, said = opened(path)
    assert isinstance(model, TransformersModel)
    assert model.identity.name == str(path)
    (line,) = said
    assert line.startswith(f"{path}: run by transformers, not by our own code, because ")
    kind = json.loads((path / "config.json").read_text())["model_type"]
    if architecture == "llama":
        assert "our own code cannot read its tokenizer" in line
    else:
        assert f"model_type = {kind!r} is not one we can run" in line


@pytest.mark.parametrize("layout", ["mobilellm", "llama"])
def test_our_layouts_stay_in_our_code(layout: str, tmp_path: Path) -> None:
    loaded = load(tiny_baselines.make("mobilellm", tmp_path / "m"))
    path = tmp_path / layout
    checkpoint.save(path, loaded.model, loaded.tokenizer, layout=layout)
    for backend in ("auto", "mobilellm"):
        model, said = opened(path, backend=backend, tokens_at_once=7, dtype="bfloat16")
        assert isinstance(model, InOurCode)
        assert said == []
        assert model.loaded.source == str(path)
        assert str(model.loaded.model.head_weight.dtype) == "torch.bfloat16"
        assert model.tokens_at_once == 7
    model, said = opened(path, backend="transformers")
    assert isinstance(model, TransformersModel)
    assert said == []


def test_shared_layers(tmp_path: Path) -> None:
    assert isinstance(opened(tiny_baselines.make("mobilellm-shared", tmp_path / "m"))[0], InOurCode)


def test_a_training_run_stands_for_its_model(tmp_path: Path) -> None:
    tiny_baselines.make("mobilellm", tmp_path / "run" / "model")
    model, _ = opened(tmp_path / "run")
    assert isinstance(model, InOurCode)
    model, _ = opened(tmp_path / "run", backend="transformers")
    assert isinstance(model, TransformersModel)
    assert model.identity.name == str(tmp_path / "run")


def test_a_llama_that_ours_cannot_compute(tmp_path: Path) -> None:
    path = tiny_baselines.make("mobilellm", tmp_path / "ours")
    loaded = load(path)
    checkpoint.save(tmp_path / "m", loaded.model, loaded.tokenizer, layout="llama")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    tiny_baselines.edit_config(tmp_path / "m", rope_parameters=rope, rope_theta=None)
    model, said = opened(tmp_path / "m")
    assert isinstance(model, TransformersModel)
    assert "rope_parameters = " in said[0]
    assert "config.json" not in said[0]
    with pytest.raises(ValueError, match="rope_parameters"):
        opened(tmp_path / "m", backend="mobilellm")


@pytest.mark.parametrize("backend", ["auto", "mobilellm", "transformers"])
def test_a_vocabulary_that_does_not_fit(backend: str, tmp_path: Path) -> None:
    path = tiny_baselines.make("mobilellm", tmp_path / "m")
    large = tiny_baselines.Tokenizer.train([tiny_baselines.TEXT], 400)
    large.save(path)
    with pytest.raises(ValueError, match="the tokenizer has 400 tokens and the embedding 352 rows"):
        opened(path, backend=backend)
    path = tiny_baselines.make("opt", tmp_path / "opt")
    words = tiny_baselines.tokenizer("opt")
    words.add_tokens([f"<extra_{number}>" for number in range(100)])
    words.save_pretrained(path)
    if backend != "mobilellm":
        with pytest.raises(ValueError, match=f"the tokenizer has 420 tokens and the embedding {ROWS} rows"):
            opened(path, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "mobilellm", "transformers"])
def test_one_line_for_what_cannot_be_opened(backend: str, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            opened(path, backend=backend)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    good = tiny_baselines.make("mobilellm", tmp_path / "good")

    path = shutil.copytree(good, tmp_path / "damaged")
    (path / "config.json").write_text("{")
    refused(path)
    path = shutil.copytree(good, tmp_path / "no-tokenizer")
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(path)
    path = shutil.copytree(good, tmp_path / "wrong-value")
    tiny_baselines.edit_config(path, layer_sharing_repeats=0, layer_sharing=True)
    assert "repeats" in refused(path)
    path = shutil.copytree(good, tmp_path / "no-weights")
    (path / "model.safetensors").unlink()
    refused(path)


def test_kept_answers_of_a_real_model(tmp_path: Path) -> None:
    path = tiny_baselines.make("gpt-neox", tmp_path / "m")
    (text,) = opened(path)[0].encode([tiny_baselines.TEXT[:200]])  # type: ignore[attr-defined]
    requests = [Request(tuple(text[:cut]), tuple(text[cut : cut + 5])) for cut in range(1, 60)]
    answers, counts = [], []
    for model in (open_model(path, say=print) for _ in range(2)):  # as two processes would
        cached = Cached(model, tmp_path / "answers")
        answers.append(sorted(cached.log_likelihoods(requests), key=lambda pair: pair[0]))
        counts.append((cached.cached, cached.scored))
        texts = cached.greedy([text[:5], text[:9]], ["\n"], 4)
        assert texts == model.greedy([text[:5], text[:9]], ["\n"], 4)
    assert counts == [(0, 59), (59, 0)]
    for (_, first), (_, second) in zip(*answers, strict=True):
        assert first.tokens.tobytes() == second.tokens.tobytes()
        assert first.greedy == second.greedy


def test_an_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="backend = 'tensorflow' is not known; choose one of auto, mobilellm"
    ):
        open_model(tmp_path, backend="tensorflow")


def test_without_transformers(tmp_path: Path) -> None:
    path = tiny_baselines.make("opt", tmp_path / "m")
    script = f"from mobilellm.eval.models import open_model\nopen_model({str(path)!r}, say=print)\n"
    ended = subprocess.run(
        [sys.executable, "-c", without("transformers") + script], capture_output=True, text=True, check=False
    )
    error = ended.stderr.splitlines()[-1]
    assert f"Error: {path}: only transformers can run it (model_type = 'opt' is not one we" in error
    assert "pip install" in error
    assert "[hf]" in error


def test_hub_ids_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as huggingface_hub lays it out: a model, one without its weights, and one that is not in it."""
    files = tiny_baselines.make("opt", tmp_path / "files")
    bpe = json.loads((files / "tokenizer.json").read_text())["model"]
    (files / "tokenizer.json").unlink()  # as the published ones of OPT are
    (files / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (files / "merges.txt").write_text("\n".join(" ".join(merge) for merge in bpe["merges"]))
    words = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "</s>",
        "eos_token": "</s>",
    }
    (files / "tokenizer_config.json").write_text(json.dumps(words))
    (files / "README.md").write_text("---\nlicense: other\n---\n")
    for name in ("opt", "half"):
        cached = tmp_path / "hub" / f"models--nobody--{name}"
        snapshot = cached / "snapshots" / "0123456789012345678901234567890123456789"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(snapshot.name)
        shutil.copytree(files, snapshot)
    (snapshot / "model.safetensors").unlink()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, (licence, reason) = opened("nobody/opt")
    assert licence == "nobody/opt: licence other"
    assert reason.startswith(
        "nobody/opt: run by transformers, not by our own code, because model_type = 'opt'"
    )
    assert isinstance(model, TransformersModel)
    assert model.identity.name == "nobody/opt"
    ids = tiny_baselines.tokenizer("opt").encode("Hello")
    assert ids[0] == 2
    assert model.encode(["Hello"]) == [ids]
    with pytest.raises(ValueError, match=r"^nobody/half: transformers cannot load it: "):
        opened("nobody/half")
    absent = "nobody/absent: no such directory, and as a Hub id: HF_HUB_OFFLINE is set; nothing of it"
    with pytest.raises(FileNotFoundError, match=f"^{absent}"):
        opened("nobody/absent")
