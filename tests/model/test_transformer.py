"""The forward pass equals transformers' Llama and, with layer sharing, its unrolled twin."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import (
    SHARED,
    TINY,
    assert_near,
    random_model,
    shared_model,
    some_tokens,
    stock_llama,
    stock_twin,
)
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.model.checkpoint import unroll
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset

FIVE = ("125m", "350m", "600m", "1b", "1.5b")
SCHEDULES = {  # of blocks 0 1 2, written out by hand
    ("immediate", 1): (0, 1, 2),
    ("immediate", 2): (0, 0, 1, 1, 2, 2),
    ("immediate", 3): (0, 0, 0, 1, 1, 1, 2, 2, 2),
    ("immediate", 4): (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2),
    ("all-over", 2): (0, 1, 2, 0, 1, 2),
    ("all-over", 3): (0, 1, 2, 0, 1, 2, 0, 1, 2),
    ("all-over", 4): (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2),
    ("reverse", 2): (0, 1, 2, 2, 1, 0),
    ("reverse", 3): (0, 1, 2, 2, 1, 0, 0, 1, 2),
    ("reverse", 4): (0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0),
}


def shrunk(name: str, tied: bool) -> ModelConfig:
    """A published shape with a quarter of the width, the same heads, 3 layers and a small vocabulary."""
    full = preset(name)
    return replace(
        full,
        vocab_size=1000,
        hidden_size=full.hidden_size // 4,
        intermediate_size=full.intermediate_size // 4,
        head_dim=full.head_dim // 4,
        num_layers=3,
        tie_word_embeddings=tied,
    )


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FIVE)
def test_logits_equal_llama(name: str, tied: bool) -> None:
    config = shrunk(name, tied)
    model = random_model(config)
    tokens = some_tokens(config.vocab_size, 2, 70)
    with torch.inference_mode():
        ours, theirs = model(tokens), stock_llama(config, model.state_dict())(tokens).logits
    assert theirs.std() > 0.1
    assert_near(ours, theirs)


def test_logits_of_the_whole_125m_equal_llama() -> None:
    config = preset("125m")
    model = MobileLLM(config, torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_635_456
    tokens = some_tokens(config.vocab_size, 1, 40)
    with torch.inference_mode():
        ours, theirs = model(tokens), stock_llama(config, model.state_dict())(tokens).logits
    assert theirs.std() > 0.1
    assert_near(ours, theirs)


@pytest.mark.parametrize("theta", [500.0, 1e6])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rope_and_norm_settings_are_obeyed(theta: float, eps: float) -> None:
    config = replace(TINY, rope_theta=theta, rms_norm_eps=eps, num_kv_heads=4, head_dim=10)
    model = random_model(config)
    tokens = some_tokens(config.vocab_size, 1, 100)
    with torch.inference_mode():
        expected = stock_llama(config, model.state_dict())(tokens).logits
        assert_near(model(tokens), expected)
        other = stock_llama(replace(config, rope_theta=1e4, rms_norm_eps=1e-5), model.state_dict())
        assert (other(tokens).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_equal_llama(tied: bool) -> None:
    config = replace(TINY, tie_word_embeddings=tied)
    model = random_model(config)
    stock = stock_llama(config, model.state_dict())
    tokens = some_tokens(config.vocab_size, 3, 20)
    next_token_loss(model(tokens), tokens).backward()
    next_token_loss(stock(tokens).logits, tokens).backward()
    theirs = dict(stock.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-5
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("how", SHARED, ids=lambda how: f"{how[0]}-{how[1]}")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sharing_equals_a_llama_with_copied_layers(how: tuple[str, int], tied: bool) -> None:
    """The independent oracle: stock Llama, blocks copied by a schedule written out by hand."""
    model = shared_model(*how, tie_word_embeddings=tied)
    stock = stock_twin(model, SCHEDULES[how])
    tokens = some_tokens(model.config.vocab_size, 2, 15)
    logits, theirs = model(tokens), stock(tokens).logits
    assert_near(logits, theirs)
    next_token_loss(logits, tokens).backward()
    next_token_loss(theirs, tokens).backward()
    copies = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            index, rest = name.removeprefix("model.layers.").split(".", 1)
            steps = [step for step, block in enumerate(SCHEDULES[how]) if block == int(index)]
            gradients = [copies[f"model.layers.{step}.{rest}"].grad for step in steps]
            assert len(gradients) == how[1]
            expected = torch.stack(gradients).sum(0)
        else:
            expected = copies[name].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("how", SHARED, ids=lambda how: f"{how[0]}-{how[1]}")
def test_unroll_gives_the_twin(how: tuple[str, int]) -> None:
    model = shared_model(*how)
    twin = unroll(model)
    assert twin.config == model.config.unrolled()
    stock = stock_twin(model, SCHEDULES[how])
    stored = stock.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in twin.state_dict().items())
    assert twin.state_dict().keys() == stored.keys() - {"lm_head.weight"}
    tokens = some_tokens(model.config.vocab_size, 2, 15)
    with torch.inference_mode():
        assert_near(twin(tokens), model(tokens))
    before = model(tokens)
    with torch.no_grad():
        for parameter in twin.parameters():  # copies, not views
            assert parameter.requires_grad
            parameter.zero_()
    torch.testing.assert_close(model(tokens), before, atol=0, rtol=0)


def test_the_order_matters() -> None:
    tokens = some_tokens(101, 1, 15)
    with torch.inference_mode():
        logits = [shared_model(*how)(tokens) for how in SHARED]
    for index, one in enumerate(logits):
        for other in logits[index + 1 :]:
            assert (one - other).abs().max() > 0.01


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_position_sees_the_future(data: st.DataObject) -> None:
    model = shared_model(*data.draw(st.sampled_from(SHARED)), layers=2)
    length = data.draw(st.integers(2, 12))
    changed = data.draw(st.integers(1, length - 1))
    tokens = some_tokens(101, 2, length)
    other = tokens.clone()
    other[:, changed:] = some_tokens(101, 2, length - changed, seed=1)
    with torch.inference_mode():
        ours, theirs = model(tokens), model(other)
    assert_near(ours[:, :changed], theirs[:, :changed])


def test_packed_documents_are_as_if_alone() -> None:
    """Positions that start again and a block-diagonal mask: what a packed batch passes in."""
    model = shared_model("immediate", 2)
    lengths = [5, 1, 9]
    documents = [some_tokens(101, 1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    same = owner[:, None] == owner[None]
    causal = torch.ones_like(same).tril()
    packed = torch.cat(documents, dim=1)
    with torch.inference_mode():
        expected = torch.cat([model(document) for document in documents], dim=1)
        shared_mask = model(packed, positions=positions, mask=same & causal)
        a_mask_a_row = model(
            packed.expand(2, -1), positions=positions.expand(2, -1), mask=(same & causal).expand(2, 1, -1, -1)
        )
    assert_near(shared_mask, expected)
    assert_near(a_mask_a_row, expected.expand(2, -1, -1))
    with torch.inference_mode():
        assert (model(packed) - expected).abs().max() > 0.01


def test_hidden_and_logits_are_the_two_halves_of_forward() -> None:
    model = random_model(replace(TINY, tie_word_embeddings=False))
    tokens = some_tokens(101, 2, 7)
    with torch.inference_mode():
        hidden = model.hidden(tokens)
        assert hidden.shape == (2, 7, model.config.hidden_size)
        assert torch.equal(model.logits(hidden), model(tokens))
        assert_near(model.logits(hidden[:, -1]), model(tokens)[:, -1])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_are_those_of_llama(tied: bool) -> None:
    config = replace(TINY, tie_word_embeddings=tied)
    model = random_model(config)
    stored = stock_llama(config, model.state_dict()).state_dict()
    assert model.state_dict().keys() == stored.keys() - ({"lm_head.weight"} if tied else set())


def test_a_tied_weight_is_one_parameter() -> None:
    tied, untied = MobileLLM(TINY), MobileLLM(replace(TINY, tie_word_embeddings=False))
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.head_weight is not untied.model.embed_tokens.weight
    rows = TINY.vocab_size * TINY.hidden_size
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == rows
    for other in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied)), tied.to(torch.bfloat16)):
        assert other.head_weight is other.model.embed_tokens.weight


def test_fresh_weights() -> None:
    config = replace(preset("tiny"), initializer_range=0.05)
    model = MobileLLM(config, torch.Generator().manual_seed(3))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            error = 0.05 / parameter.numel() ** 0.5
            assert abs(parameter.mean().item()) < 6 * error, name
            assert abs(parameter.std().item() - 0.05) < 6 * error, name
    again = MobileLLM(config, torch.Generator().manual_seed(3))
    other = MobileLLM(config, torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.head_weight, other.head_weight)


def test_a_meta_model_has_shapes_only() -> None:
    with torch.device("meta"):
        model = MobileLLM(preset("1.5b"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_511_188_800
    assert torch.get_default_device().type == "cpu"
    assert not any(parameter.is_meta for parameter in MobileLLM(TINY).parameters())


def test_half_precision_stays_near_float32() -> None:
    model = shared_model("immediate", 2)
    tokens = some_tokens(101, 2, 20)
    with torch.inference_mode():
        exact = model(tokens)
        for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)):
            logits = copy.deepcopy(model).to(dtype)(tokens)
            assert logits.dtype == dtype
            assert (logits.double() - exact.double()).abs().max() < tolerance * exact.abs().max()
