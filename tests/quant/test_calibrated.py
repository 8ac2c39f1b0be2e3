from __future__ import annotations

import pytest
import torch
from quantized_models import SHAPE, SPELLINGS, random_model, shared, small_tokenizer, some_tokens
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.eval.torch_model import TorchModel
from mobilellm.model.transformer import MobileLLM
from mobilellm.quant.artefact import assemble, quantized_model
from mobilellm.quant.calibrated import calibrated
from mobilellm.quant.compare import Judge, windows
from mobilellm.quant.gptq import gptq
from mobilellm.quant.nearest import round_to_nearest
from mobilellm.quant.schemes import Scheme
from mobilellm.quant.sensitivity import sensitivities

WINDOWS = tuple(some_tokens(300, 12, 90))


def quiet(what: str, done: int, total: int) -> None:
    assert what in ("windows looked at", "blocks")
    assert 0 <= done < total


def kl(source: MobileLLM, made: MobileLLM) -> float:
    """On tokens that were not calibrated on."""
    tokens = some_tokens(300, 8, 90, seed=1)
    with torch.inference_mode():
        a, b = (model(tokens).log_softmax(-1) for model in (source, made))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("q4_0", SHAPE),
        ("q4_0, embedding q8_0", shared("immediate", 2)),
        ("8da4w", shared("reverse", 2, tie_word_embeddings=False)),
        ("8da4w, kv", shared("all-over", 2)),
    ],
    ids=["plain", "immediate", "reverse", "all-over"],
)
def test_a_calibrated_model_is_nearer_to_its_source(name: str, config: ModelConfig) -> None:
    source, chosen = random_model(config), SPELLINGS[name]
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    found = calibrated(source, chosen, WINDOWS, True, quiet)
    nearest = round_to_nearest(source, chosen)
    assert found.keys() == nearest.keys()
    made = [quantized_model(source, assemble(source, chosen, each)) for each in (found, nearest)]
    assert kl(source, made[0]) < 0.9 * kl(source, made[1])
    assert all(torch.equal(before[key], tensor) for key, tensor in source.state_dict().items())
    assert source.quantization is None


@pytest.mark.parametrize("order", ["immediate", "reverse", "all-over"])
def test_a_shared_block_is_calibrated_on_all_its_uses(order: str) -> None:
    """The first matrix by hand: H of q, k and v of block 0 sums the inputs of both its runs, weighted."""
    source, chosen = random_model(shared(order, 2)), SPELLINGS["int8"]
    found = calibrated(source, chosen, WINDOWS[:3], False, quiet)
    twin = random_model(shared(order, 2))
    weights = sensitivities(twin, WINDOWS[:3], quiet)
    with torch.inference_mode():
        twin.model.embed_tokens.weight.copy_(found["model.embed_tokens.weight"].values())
        seen: list[Tensor] = []
        q = twin.model.layers[0].self_attn.q_proj
        handle = q.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0][0]))
        for window in WINDOWS[:3]:
            twin.hidden(window[None])
        handle.remove()
        assert len(seen) == 6
        parts = [weights.products[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv"]
        matters = [sum(part[window][use] for part in parts) / 3 for window in range(3) for use in range(2)]
        hessian = sum((x.T * each) @ x for x, each in zip(seen, matters, strict=True))
        assert isinstance(hessian, Tensor)
        expected = gptq(q.weight, hessian, chosen.linear, act_order=False)
    assert (found["model.layers.0.self_attn.q_proj.weight"].codes == expected.codes).float().mean() > 0.999


def test_matrices_that_stay_wide_are_left_alone() -> None:
    from dataclasses import replace

    source = random_model(replace(SHAPE, intermediate_size=172))
    chosen: Scheme = SPELLINGS["q4_0"]
    found = calibrated(source, chosen, WINDOWS[:2], True, quiet)
    assert not [name for name in found if "down_proj" in name]
    made = quantized_model(source, assemble(source, chosen, found))
    down = made.model.layers[0].mlp.down_proj.weight
    assert torch.equal(down, source.model.layers[0].mlp.down_proj.weight.half().float())


def test_what_cannot_be_calibrated_is_refused() -> None:
    source = random_model(SHAPE)
    with pytest.raises(ValueError, match="there is no text to calibrate on"):
        calibrated(source, SPELLINGS["q4_0"], (), True, quiet)
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj.weight: there are weights that are not finite"
    ):
        calibrated(source, SPELLINGS["q4_0"], WINDOWS[:1], True, quiet)


def test_the_judge_agrees() -> None:
    """KL as the command reports it."""
    source, chosen = random_model(SHAPE), SPELLINGS["q4_0"]
    model = TorchModel(source, small_tokenizer(), "random", 1_024)
    judge = Judge(source, windows(model, ["some words of all kinds, and more. " * 40], 60, 400))
    costs = [
        judge(quantized_model(source, assemble(source, chosen, each))).kl
        for each in (calibrated(source, chosen, WINDOWS, True, quiet), round_to_nearest(source, chosen))
    ]
    assert costs[0] < costs[1]


@pytest.mark.parametrize("order", ["immediate", "reverse"])
def test_sensitivities_are_squared_gradients(order: str) -> None:
    """For one window: the gradient of an output is that of something added to it."""
    source = random_model(shared(order, 2))
    window = WINDOWS[0]
    found = sensitivities(source, [window], lambda what, done, total: None)
    assert len(found.products) == 7 * source.config.num_layers
    name = "model.layers.1.mlp.down_proj"
    added = [torch.zeros(1, 90, source.config.hidden_size, requires_grad=True) for _ in range(2)]
    pending = iter(added)
    part = source.get_submodule(name)
    handle = part.register_forward_hook(lambda part, inputs, output: output + next(pending))
    inputs_of_blocks: list[Tensor] = []
    looking = source.model.layers[0].register_forward_pre_hook(
        lambda part, inputs: inputs_of_blocks.append(inputs[0])
    )
    logits = source(window[None])[0]
    looked_up = inputs_of_blocks[0]
    looked_up.retain_grad()
    handle.remove()
    looking.remove()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    wanted = [each.grad[0].square().sum(-1) for each in added if each.grad is not None]
    mean = torch.cat(wanted).mean()
    for ours, theirs in zip(found.products[f"{name}.weight"][0], wanted, strict=True):
        torch.testing.assert_close(ours, theirs / mean, rtol=1e-3, atol=1e-4)
    assert looked_up.grad is not None
    torch.testing.assert_close(found.embedding, looked_up.grad[0].T @ looked_up.grad[0], rtol=1e-3, atol=1e-4)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(found.head[0], (p * (1 - p)).sum(-1), rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad for parameter in source.parameters())
