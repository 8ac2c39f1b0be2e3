"""Which weights decay, and one step of AdamW with clipping written out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import LS, ORDINARY, same_weights, tiny_loader, tiny_model, tiny_run, tiny_settings

from mobilellm.config import ModelConfig
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.train import optim
from mobilellm.train.float_muon import FloatMuon
from mobilellm.train.loss import weighted_loss
from mobilellm.train.optim import KernelAdamW, adamw, build_optimizer

SHAPES = {
    "shared and tied": LS,
    "ordinary and tied": ORDINARY,
    "untied": replace(LS, tie_word_embeddings=False),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_matrices_decay_and_norms_do_not(config: ModelConfig) -> None:
    model = tiny_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, undecayed = adamw(model, tiny_settings(weight_decay=0.3).optim).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    groups = [sorted(names[parameter] for parameter in group["params"]) for group in (decayed, undecayed)]
    assert groups[0] == sorted(name for name in names.values() if "norm" not in name)
    assert groups[1] == sorted(name for name in names.values() if "norm" in name)
    assert sum(map(len, groups)) == len(list(model.parameters()))  # every one once
    assert sum("embed" in name or "lm_head" in name for name in groups[0]) == (
        1 if config.tie_word_embeddings else 2
    )


def test_the_settings_reach_the_optimiser() -> None:
    settings = tiny_settings(lr=3e-4, beta1=0.7, beta2=0.8, epsilon=1e-5).optim
    for group in adamw(tiny_model(), settings).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.7, 0.8), 1e-5)


@pytest.mark.parametrize("narrow", [False, True], ids=["no bfloat16", "bfloat16"])
def test_muon_is_for_the_matrices_of_the_blocks(monkeypatch: pytest.MonkeyPatch, narrow: bool) -> None:
    """One combined optimiser takes the steps that torch's two take apart, bit for bit."""
    monkeypatch.setattr(optim, "has_bfloat16", lambda: narrow)
    settings = tiny_settings(**{"optim.name": "muon", "weight_decay": 0.3}).optim
    model, twin = tiny_model(), tiny_model()
    combined = build_optimizer(model, settings)
    matrices = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    named = dict(twin.named_parameters())
    hidden = [parameter for name, parameter in named.items() if name.split(".")[-2] in matrices]
    norms = [parameter for name, parameter in named.items() if "norm" in name]
    rest = [
        {"params": [twin.model.embed_tokens.weight], "weight_decay": 0.3},
        {"params": norms, "weight_decay": 0.0},
    ]
    assert len(hidden) + len(norms) + 1 == len(named)
    apart = (
        (torch.optim.Muon if narrow else FloatMuon)(
            hidden, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True),
    )
    for step in range(3):
        combined.load_state_dict(combined.state_dict())  # its parts go on with what was read
        for each in (model, twin):
            generator = torch.Generator().manual_seed(step)
            for parameter in each.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in (combined, *apart):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)  # as the schedule sets it
            optimizer.step()
        assert same_weights(model, twin)


@pytest.mark.parametrize("limit", [0.5, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_pass_is_clipping_and_adamw(kernels: Kernels, limit: float, dtype: torch.dtype) -> None:
    """Against torch's two, given the same gradients; the state too, which either goes on from."""
    settings = tiny_settings(weight_decay=0.3).optim
    model, twin = tiny_model(), tiny_model()
    ours, plain = build_optimizer(model, settings, kernels), adamw(twin, settings)
    assert isinstance(ours, KernelAdamW)
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad_dtype = dtype
            parameter.grad, other.grad = gradient, gradient.float().clone()
        for optimizer in (ours, plain):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)  # as the schedule sets it
        if step in (1, 2):  # what one step was scaled by is no matter of the next
            norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), limit).item()
            assert ours.clip(limit) == pytest.approx(norm, rel=1e-5)
        ours.step()
        plain.step()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
            assert ours.state[parameter].keys() == plain.state[other].keys()
            for name, value in plain.state[other].items():
                assert ours.state[parameter][name].dtype == value.dtype
                torch.testing.assert_close(ours.state[parameter][name], value, rtol=2e-6, atol=2e-7)
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2**14, 2**14 + 1, 50_000])
def test_squares_are_summed_in_pieces(kernels: Kernels, count: int, dtype: torch.dtype) -> None:
    """By any number of threads to the same bit."""
    numbers, before = (
        torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype),
        torch.get_num_threads(),
    )
    sums = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = torch.empty((), dtype=torch.float64)
        kernels("sum_of_squares", numbers, int(dtype == torch.float32), found, count)
        sums.append(found.item())
    torch.set_num_threads(before)
    assert sums[0] == sums[1] == pytest.approx(numbers.double().square().sum().item(), rel=1e-6)


def test_a_gradient_that_is_no_number_is_seen(kernels: Kernels) -> None:
    """The guard stops at a norm that is not finite, as torch's clipping gives it."""
    model = tiny_model()
    optimizer = build_optimizer(model, tiny_settings().optim, kernels)
    assert isinstance(optimizer, KernelAdamW)
    for poison in (float("nan"), float("inf"), 1e30):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        model.model.norm.weight.grad[3] = poison  # type: ignore[index]
        assert not math.isfinite(optimizer.clip(1.0))


@pytest.mark.parametrize("clip_norm", [0.5, 1000.0])
def test_the_first_two_steps_written_out(tmp_path: Path, clip_norm: float) -> None:
    """Loshchilov & Hutter's algorithm in float64, gradients clipped by their common norm."""
    settings = tiny_settings(
        steps=2, warmup_steps=0, final_fraction=1.0, clip_norm=clip_norm, weight_decay=0.2, epsilon=1e-4
    )
    model, loader = tiny_model(), tiny_loader(settings)
    parameters = dict(model.named_parameters())
    first = {name: np.zeros(tuple(parameter.shape)) for name, parameter in parameters.items()}
    second = {name: np.zeros(tuple(parameter.shape)) for name, parameter in parameters.items()}
    norms = []
    for step in (1, 2):
        batch = [torch.from_numpy(array) for array in loader.next()[:3]]
        model.zero_grad()
        (weighted_loss(model, *batch) / batch[2].sum()).backward()
        gradients = {name: parameter.grad.double().numpy() for name, parameter in parameters.items()}
        norms.append(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values())))
        scale = min(1.0, clip_norm / norms[-1])
        for name, parameter in parameters.items():
            gradient = gradients[name] * scale
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            mean = first[name] / (1 - 0.9**step)
            deviation = np.sqrt(second[name] / (1 - 0.95**step))
            decay = 0.0 if "norm" in name else 0.2
            value = parameter.detach().double().numpy()
            value = value - 1e-2 * decay * value - 1e-2 * mean / (deviation + 1e-4)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(value))
    run = tiny_run(tmp_path, settings)
    recorded = [record["gradient_norm"] for record in run.records]
    assert recorded == pytest.approx(norms, rel=1e-5)  # as they were before clipping
    assert (max(norms) > 0.5, max(norms) < 1000) == (True, True)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-5, atol=2e-6)


def test_a_shared_block_gets_the_gradients_of_all_its_turns() -> None:
    """Against the same model with copied blocks: the sum over the copies."""
    from mobilellm.model.checkpoint import unroll

    settings, model = tiny_settings(), tiny_model()
    twin = unroll(model)
    batch = [torch.from_numpy(array) for array in tiny_loader(settings).next()[:3]]
    for each in (model, twin):
        weighted_loss(each, *batch).backward()
    for index, block in enumerate(model.model.layers):
        copies = [twin.model.layers[step] for step, stored in enumerate(LS.schedule) if stored == index]
        for name, parameter in block.named_parameters():
            total = sum(dict(copy.named_parameters())[name].grad for copy in copies)
            torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-4)
