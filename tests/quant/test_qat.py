"""A model in quantisation-aware training is, within a step, the one that quantising and exporting give."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_models import SHAPE, SPELLINGS, random_model, rounded, saved, shared, small_tokenizer
from torch import Tensor

from mobilellm.cli.main import _main
from mobilellm.eval.perplexity import windowed
from mobilellm.export.answer_checks import LOGITS_BAR
from mobilellm.gguf import read_gguf
from mobilellm.model import checkpoint
from mobilellm.model.quantized import read_quantized
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.formats import WeightFormat
from mobilellm.quant.qat import QuantizedWhile
from mobilellm.quant.schemes import scheme
from mobilellm.runtime import engine, reference

TOKENS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(3))
WITHOUT_KV = [name for name in SPELLINGS if "kv" not in name]


def weights(model: MobileLLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(model: MobileLLM) -> Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


def trained(model: MobileLLM, name: str, steps: int = 3) -> QuantizedWhile:
    """`model` after some steps of quantisation-aware training."""
    quantized = QuantizedWhile(model, SPELLINGS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        with quantized():
            loss_of(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return quantized


@pytest.mark.parametrize("name", WITHOUT_KV)
@pytest.mark.parametrize("change", [{}, {"intermediate_size": 172}, {"tie_word_embeddings": False}])
def test_within_it_is_the_quantised_model_bit_for_bit(name: str, change: dict[str, int]) -> None:
    """Embedding and head too, tied or not, and matrices that groups do not divide."""
    config = replace(SHAPE, **change)  # type: ignore[arg-type]
    model, _, expected = rounded(SPELLINGS[name], config)
    before, plain = weights(model), model(TOKENS)
    with QuantizedWhile(model, SPELLINGS[name])():
        assert same(weights(model), weights(expected))
        assert torch.equal(model(TOKENS), expected(TOKENS))
    assert same(weights(model), before)
    assert torch.equal(model(TOKENS), plain)
    assert model.quantization is None


@pytest.mark.parametrize("name", WITHOUT_KV)
def test_gradients_of_the_rounded_weights_are_those_of_the_ordinary_ones(name: str) -> None:
    model, _, expected = rounded(SPELLINGS[name], shared("immediate", 2))
    with QuantizedWhile(model, SPELLINGS[name])():
        loss_of(model).backward()  # type: ignore[no-untyped-call]
    for parameter in expected.parameters():
        parameter.requires_grad_()
    loss_of(expected).backward()  # type: ignore[no-untyped-call]
    for (part, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), part
        assert ours.grad.any(), part


def test_every_matrix_is_rounded_once_a_step_however_often_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shared("immediate", 3)
    model, rows = random_model(config), list[int]()
    quantize = WeightFormat.quantize

    def counted(self: WeightFormat, weight: Tensor) -> object:
        rows.append(len(weight))
        return quantize(self, weight)

    monkeypatch.setattr(WeightFormat, "quantize", counted)
    with QuantizedWhile(model, scheme("q4_0"))():
        loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert sum(rows) == sum(parameter.shape[0] for parameter in model.parameters() if parameter.ndim == 2)


def test_weights_come_back_when_something_goes_wrong_within() -> None:
    model = random_model(SHAPE)
    before, quantized = weights(model), QuantizedWhile(model, scheme("q4_0"))
    with pytest.raises(KeyboardInterrupt), quantized():
        raise KeyboardInterrupt
    assert same(weights(model), before)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = torch.inf  # type: ignore[index, union-attr]
    with (
        pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight: q4_0: there are weights"),
        quantized(),
    ):
        pass
    assert model.quantization is None


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_0, embedding q8_0"])
def test_what_was_trained_is_what_a_file_holds_and_a_runtime_computes(name: str, tmp_path: Path) -> None:
    """Bitwise: the file that the ordinary weights are exported to, the one from the quantised directory, and
    the weights of the last step. Logits: of the numpy runtime and of the native one, where it compiles."""
    model, directory = saved(tmp_path / "model", shared("immediate", 2)), tmp_path / "model"
    quantized = trained(model, name)
    checkpoint.save(directory, model, small_tokenizer(), overwrite=True)
    chosen = SPELLINGS[name]
    q = ["--scheme", chosen.name, "--embedding", chosen.embedding.name, "--eval-tokens", "0"]
    to = ["--type", chosen.linear.name, "--embedding-type", chosen.embedding.name]
    assert _main(["quantize", str(directory), str(tmp_path / "small"), *q]) == 0
    assert _main(["export", str(directory), str(tmp_path / "a.gguf"), "--no-verify", *to]) == 0
    assert _main(["export", str(tmp_path / "small"), str(tmp_path / "b.gguf"), "--no-verify"]) == 0
    a, b = (read_gguf(tmp_path / f"{file}.gguf.unverified") for file in "ab")
    assert a.tensors.keys() == b.tensors.keys()
    for tensor in a.tensors:
        assert a.raw(tensor).tobytes() == b.raw(tensor).tobytes(), tensor
    stored = read_quantized(tmp_path / "small")
    with quantized(), torch.inference_mode():
        for part, values in stored.tensors().items():
            assert torch.equal(model.get_parameter(part), values), part
        wanted = model(TOKENS[:1])[0].numpy()
    runtimes = [reference.ReferenceModel(a)]
    if engine.missing() is None:
        runtimes.append(engine.NativeModel(a, threads=1))
    for runtime in runtimes:
        found = runtime.logits(runtime.forward(TOKENS[0].numpy(), runtime.new_cache()))
        off = np.sqrt(np.mean((found - wanted) ** 2) / np.var(wanted))
        assert off < LOGITS_BAR / 2, runtime


@pytest.mark.parametrize("name", ["8da4w", "8da4w, embedding int4", "int8", "w8a8"])
def test_what_was_trained_is_what_quantize_writes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes and scales, bitwise; and the directory, as any command loads it, gives the logits of the last step."""
    model, directory = saved(tmp_path / "model", SHAPE), tmp_path / "model"
    quantized = trained(model, name)
    checkpoint.save(directory, model, small_tokenizer(), overwrite=True)
    chosen = SPELLINGS[name]
    q = ["--scheme", chosen.name, "--embedding", chosen.embedding.name, "--eval-tokens", "0", "--json"]
    assert _main(["quantize", str(directory), str(tmp_path / "small"), *q]) == 0
    assert json.loads(capsys.readouterr().out)["scheme"] == chosen.name
    stored = checkpoint.read_weights(tmp_path / "small").quantized
    assert stored is not None
    loaded = checkpoint.build(checkpoint.read_weights(tmp_path / "small"))
    with quantized(), torch.no_grad():
        assert same(weights(model), stored.tensors())
        assert torch.equal(model(TOKENS), loaded(TOKENS))


def test_training_so_lowers_the_loss_of_the_quantised_model() -> None:
    model = random_model(SHAPE)
    quantized = QuantizedWhile(model, scheme("q4_0"))
    with quantized():
        before = loss_of(model).item()
    trained(model, "q4_0", steps=20)
    with quantized():
        assert loss_of(model).item() < before - 0.5


def test_what_cannot_be_trained_so_is_refused() -> None:
    _, _, already = rounded(scheme("int8"))
    with pytest.raises(ValueError, match="qat: the model is quantised already \\(int8\\); start from what"):
        QuantizedWhile(already, scheme("q4_0"))
    with pytest.raises(ValueError, match="group = 64 does not divide the rows of 160"):
        QuantizedWhile(random_model(SHAPE), scheme("8da4w", group=64))
    adapted = random_model(SHAPE)
    block = adapted.model.layers[1]
    block.mlp.up_proj = torch.nn.Sequential(block.mlp.up_proj)  # type: ignore[assignment, union-attr, arg-type]
    with pytest.raises(ValueError, match="qat: the model has adapters beside its matrices"):
        QuantizedWhile(adapted, scheme("q4_0"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q4_0", "8da4w, embedding int4"])
def test_it_recovers_most_of_what_rounding_costs_a_trained_model(name: str, small_text: Path) -> None:
    """At least half, against training on for as many steps and then rounding, on text that was held out."""
    stream = torch.from_numpy(np.frombuffer(small_text.read_bytes(), np.uint8).astype(np.int64))
    stream = stream[stream < 256]
    training, held_out = stream[:-20_000], stream[-20_000:]
    model = MobileLLM(replace(SHAPE, initializer_range=0.08), torch.Generator().manual_seed(1))

    def train(
        model: MobileLLM, steps: int, lr: float, passes: Callable[[], AbstractContextManager[None]]
    ) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        draw = torch.Generator().manual_seed(2)
        for step in range(steps):
            starts = torch.randint(len(training) - 65, (16,), generator=draw)
            rows = torch.stack([training[start : start + 65] for start in starts])
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            with passes():
                loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def loss(model: MobileLLM) -> float:
        return windowed(model, held_out.numpy(), 64, batch=32).loss

    train(model, 500, 4e-3, nullcontext)
    further, aware = copy.deepcopy(model), copy.deepcopy(model)
    train(further, 150, 1e-3, nullcontext)
    quantized = QuantizedWhile(aware, SPELLINGS[name])
    train(aware, 150, 1e-3, quantized)
    plain = loss(further)
    with QuantizedWhile(further, SPELLINGS[name])():
        cost = loss(further) - plain
    with quantized():
        left = loss(aware) - plain
    print(f"{name}: {plain:.4f}, rounded {cost:+.4f}, quantisation-aware {left:+.4f}")
    assert cost > 0.005
    assert left < cost / 2
