"""Adapters on training's faster way against peft's own modules in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="needs the extra finetune")

from adapted_models import adapted_model, some_tokens

from mobilellm.model import training, training_steps
from mobilellm.model.adapters import narrow
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.products import FLOATS, PAIRS, KernelProducts, TorchProducts
from mobilellm.model.projection import Adapter, Projection
from mobilellm.model.training import training_hidden
from mobilellm.model.transformer import MobileLLM

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "rslora of some": {"rslora": True, "targets": ("v_proj", "up_proj")},
    "dora of some": {"dora": True, "targets": ("k_proj", "o_proj", "gate_proj")},
}


def gradients(model: MobileLLM, tokens: Tensor, autocast: bool, **options: Any) -> dict[str, Tensor]:
    """Of a fixed random projection of the hidden states, which are among them."""
    model.zero_grad()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        hidden = training_hidden(model, tokens, **options)[0]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (hidden * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.double() for name, grad in found.items()} | {"hidden": hidden.detach().double()}


def distances(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: ((a[name] - b[name]).norm() / b[name].norm()).item() for name in a}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["torch", FLOATS, PAIRS])
def test_gradients_are_those_of_the_modules(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    """As close to float64 as peft's modules under autocast are; nothing frozen has a gradient."""
    if way != "torch" and way not in kernels:
        pytest.skip("this processor multiplies no pairs of bfloat16")
    ways = TorchProducts() if way == "torch" else KernelProducts(kernels, way)
    monkeypatch.setattr(training, "products", lambda _: ways)
    model, tokens = adapted_model(**KINDS[kind]).train(), some_tokens(3, 40)
    exact = gradients(copy.deepcopy(model).double(), tokens, autocast=False)
    narrow(model)  # that is what the faster way is given
    taken = steps_taken(monkeypatch)
    fast = distances(gradients(model, tokens, autocast=True), exact)
    assert taken.count("attention") == 4  # two blocks, each run twice
    assert max(fast.values()) < 0.06
    assert sum(fast.values()) / len(fast) < 0.03
    assert all("lora_" in name for name in exact if name != "hidden")


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []
    attend = training_steps._attend

    def noted(*arguments: Any) -> Any:
        taken.append("attention")
        return attend(*arguments)

    monkeypatch.setattr(training_steps, "_attend", noted)
    return taken


@pytest.mark.parametrize("dora", [False, True])
def test_recomputed_blocks_and_documents(kernels: Kernels, dora: bool) -> None:
    model, tokens = adapted_model(dora=dora).train(), some_tokens(2, 30)
    segments = torch.arange(30).expand(2, 30) // 11
    kept = gradients(model, tokens, autocast=True, segments=segments)
    again = gradients(model, tokens, autocast=True, segments=segments, activation_checkpointing=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    exact = gradients(copy.deepcopy(model).double(), tokens, autocast=False, segments=segments)
    assert max(distances(kept, exact).values()) < 0.06


def test_dropout_reaches_the_adapters_alone(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """With B = 0 it changes nothing; its expectation is the adapter without; backward sees the same mask."""
    tokens = some_tokens(2, 30)
    taken = steps_taken(monkeypatch)
    fresh = [gradients(adapted_model(moved=False, dropout=p).train(), tokens, True) for p in (0.0, 0.5)]
    assert len(taken) == 8
    assert torch.equal(fresh[0]["hidden"], fresh[1]["hidden"])
    model = adapted_model(dropout=0.5)
    evaluated = gradients(model.eval(), tokens, True)["hidden"]
    assert torch.equal(evaluated, gradients(adapted_model().eval(), tokens, True)["hidden"])
    torch.manual_seed(4)
    kept = gradients(model.train(), tokens, True)
    torch.manual_seed(4)
    again = gradients(model, tokens, True, activation_checkpointing=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert not torch.equal(kept["hidden"], gradients(model, tokens, True)["hidden"])


def test_the_maps_of_an_input_that_is_dropped_in_part(kernels: Kernels) -> None:
    """Against the formula with the very mask that was drawn."""
    draw = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, requires_grad=True)

    x = matrix(20, 16)
    tensors = [matrix(8, 16), matrix(12, 16), matrix(4, 16), matrix(12, 4)]  # the second has an adapter
    maps = Projection(TorchProducts(), [None, Adapter(2.0, 0.25, False)])
    torch.manual_seed(2)
    narrowed, plain = x.detach().bfloat16(), [tensor.detach() for tensor in tensors]
    y, kept = maps.through(narrowed, plain)
    assert len(kept) == maps.num_kept
    torch.manual_seed(2)
    mask = torch.rand(20, 16) >= 0.25
    assert 0.5 < mask.float().mean() < 0.95
    wanted = torch.cat(
        [x @ tensors[0].T, x @ tensors[1].T + 2 * (x * mask / 0.75) @ tensors[2].T @ tensors[3].T], 1
    )
    dy = torch.randn(wanted.shape, generator=draw)
    (wanted * dy).sum().backward()
    assert relative(y, wanted) < 0.01
    dx, flow = maps.back(dy.bfloat16(), plain, kept)
    found = maps.gradients(flow, narrowed, plain, kept, [True] * 4, torch.float32)
    for ours, theirs in zip([dx, *found], [x, *tensors], strict=True):
        assert ours is not None
        assert theirs.grad is not None
        assert relative(ours, theirs.grad) < 0.01
    frozen = maps.gradients(flow, narrowed, plain, kept, [False, False, True, True], torch.float32)
    assert frozen[:2] == [None, None]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_what_it_does_not_compute_goes_to_the_modules(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout with a magnitude, two adapters at once, a hook: that block alone, and rightly."""
    tokens = some_tokens()
    taken = steps_taken(monkeypatch)

    def steps(model: MobileLLM) -> int:
        taken.clear()
        gradients(model.train(), tokens, autocast=True)
        return len(taken)

    change: dict[str, Callable[[Any], Any]] = {
        "hook": lambda layer: layer.register_forward_hook(lambda *_: None),
        "disabled": lambda layer: layer.enable_adapters(False),
        "merged": lambda layer: layer.merge(),
    }
    assert steps(adapted_model(dora=True)) == 4
    assert steps(adapted_model(dora=True, dropout=0.1)) == 0
    for name, apply in change.items():
        model = adapted_model()
        apply(model.model.layers[0].mlp.up_proj)  # type: ignore[union-attr]
        assert steps(model) == 2, name
