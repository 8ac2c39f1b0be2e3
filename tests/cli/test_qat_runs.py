"""`mobilellm train` with [qat]: what a run leaves, going on exactly, and what is refused."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilellm.cli.main import _main
from mobilellm.data.shards import read_split
from mobilellm.eval.perplexity import windowed
from mobilellm.export.source import open_source
from mobilellm.model import cpu_kernels
from mobilellm.model.api import load
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.quantized import Origin, read_quantized
from mobilellm.quant.nearest import round_to_nearest
from mobilellm.quant.schemes import scheme
from mobilellm.report.progress import TrainingProgress
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.metrics import read_metrics

from .test_train import command, refused, same_model, stop_at, timeless, written_place

QAT = ("--qat.scheme", "q4_0", "--qat.embedding", "q8_0", "--qat.after-steps", "2")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    return written_place(tmp_path_factory.mktemp("train"), small_text)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("qat") / "run"
    assert _main(command(place, out, *QAT)) == 0
    return out


def test_a_run_leaves_both_models_and_they_are_one(whole: Path) -> None:
    """The quantised directory is what quantising the ordinary weights gives, bit for bit."""
    stored = read_quantized(whole / "quantized")
    expected = round_to_nearest(load(whole / "model").model, scheme("q4_0", "q8_0"))
    assert stored.matrices.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.equal(stored.matrices[name].codes, matrix.codes), name
        assert torch.equal(stored.matrices[name].scales, matrix.scales), name
    assert (stored.quantization.linear, stored.quantization.embedding) == ("q4_0", "q8_0")
    report = json.loads((whole / "quantized" / "quantization.json").read_text())["report"]
    assert report["trained"] is True
    assert stored.origin == Origin(open_source(whole / "model", print).fingerprint, "rtn")
    assert load(whole / "quantized").tokenizer is not None


def test_evaluations_are_of_the_quantised_model_from_the_start(place: Path, whole: Path) -> None:
    """The last one is that of the directory it leaves; plain training has another first one."""
    tokenizer = Tokenizer.load(place / "one" / "tokenizer")
    stream = np.asarray(read_split(place / "one", "held-out", tokenizer)[:3000])
    found = [record["eval"]["loss"] for record in read_metrics(whole / "metrics.jsonl") if "eval" in record]
    losses = [windowed(load(whole / name).model, stream, 32).loss for name in ("quantized", "model")]
    assert found[-1] == losses[0] != losses[1]
    assert found[-1] < found[0] - 0.3


def test_a_run_goes_on_exactly(
    place: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped within the quantised steps; and not as a run of another kind."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "update", stop_at(3, signal.SIGTERM))
        assert _main(command(place, out, *QAT)) == 75
    assert (out / "quantized").is_dir()
    other = refused(capsys, command(place, out, *QAT, "--qat.scheme", "q8_0"))
    assert "--qat.scheme 'q4_0', not 'q8_0'" in other
    assert "--qat.scheme 'q4_0', not None" in refused(capsys, command(place, out))
    assert _main(command(place, out, *QAT)) == 0
    assert same_model(out, whole)
    assert timeless(out) == timeless(whole)
    ours, theirs = (each / "quantized" / "quantized.safetensors" for each in (out, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_bfloat16_goes_the_fast_way(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernels' blocks, weights rounded once a step and inputs within; it says what it does."""
    if isinstance(found := cpu_kernels.load(), str):
        pytest.skip(f"no kernels for training on this machine: {found}")
    called, call = Counter[str](), Kernels.__call__

    def counted(self: Kernels, name: str, *arguments: Any) -> None:
        called[name] += 1
        call(self, name, *arguments)

    monkeypatch.setattr(Kernels, "__call__", counted)
    flags = ["--compute.precision", "bfloat16", "--qat.scheme", "8da4w", "--steps", "3"]
    assert _main(command(place, tmp_path / "run", *flags)) == 0
    blocks, batches = load(tmp_path / "run" / "quantized").model.config.num_steps, 3 * 2
    assert called["swiglu"] == blocks * batches
    # before q, k, v, before o, before gate and up, before down; three of them again in backward; the head's
    assert called["round_activations"] == batches * (blocks * (4 + 3) + 1)
    said = capsys.readouterr().out
    assert "quantisation-aware: int4, embedding and head int8; evaluations are of the quantised model" in said
    assert "run/quantized 'Return a' --temperature 0.7" in said


def test_a_quantised_model_is_no_start(place: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["--model.init-from", str(whole / "quantized")]
    said = refused(capsys, command(place, whole.parent / "other", *start, *QAT))
    assert "quantized is quantised; start from what it was made from" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qat.scheme", "q5_k"], "--qat.scheme 'q5_k' is not known; choose one of q8_0, q4_0"),
        (["--qat.embedding", "int8"], "--qat.embedding int8 does not go with q4_0; choose q4_0 or q8_0"),
        (["--qat.group", "64"], "--qat.group 64 does not go with q4_0"),
        (["--qat.scheme", "8da4w", "--qat.group", "96"], "--qat.group 96 does not divide the rows of"),
        (["--qat.after-steps", "6"], "--qat.after-steps 6 must be 0 or above, and below steps = 6"),
        (["--qat.after-steps", "-1"], "--qat.after-steps -1 must be 0 or above"),
        (["--qat.scheme", "q8_0", "--compute.strategy", "fsdp"], "qat needs whole matrices, which"),
        (["--qat.scheme", "q8_0", "--lora.rank", "4"], "qat and lora exclude each other"),
    ],
)
def test_refusals(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    for further in ([], ["--plan"]):
        assert message in refused(capsys, command(place, tmp_path / "run", *flags, *further))
    assert not (tmp_path / "run").exists()
