"""The transformers model computes what stock Llama computes: forward, backward, every cache, generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import SCHEDULES, SHAPE, plain_model, shared_model, some_tokens, stock_twin
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from mobilellm.hf import MobileLLMForCausalLM

Pair = tuple[MobileLLMForCausalLM, LlamaForCausalLM]


@pytest.fixture(params=SCHEDULES, ids=lambda key: f"{key[0]}-{key[1]}")
def pair(request: pytest.FixtureRequest) -> Pair:
    """A model that shares layers, and its stock twin that does not."""
    model = shared_model(*request.param)
    return model, stock_twin(model, SCHEDULES[request.param])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def caches(model: MobileLLMForCausalLM) -> list[Cache]:
    return [DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=16)]


# --- the same function as stock Llama ---


@pytest.mark.parametrize("tied", [True, False])
def test_without_sharing_it_is_llama(tied: bool) -> None:
    model = plain_model(tie_word_embeddings=tied)
    twin, ids = stock_twin(model), some_tokens()
    ours, theirs = model(ids, labels=ids), twin(ids, labels=ids)
    close(ours.logits, theirs.logits)
    close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(model.named_parameters())
    assert gradients.keys() == dict(twin.named_parameters()).keys()
    for name, parameter in twin.named_parameters():
        close(gradients[name].grad, parameter.grad)


def test_sharing_equals_the_unrolled_llama(pair: Pair) -> None:
    model, twin = pair
    ids = some_tokens()
    ours, theirs = (m(ids, output_hidden_states=True, labels=ids) for m in pair)
    close(ours.logits, theirs.logits)
    for mine, its in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(mine, its)
    ours.loss.backward()
    theirs.loss.backward()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        if name.startswith("model.layers."):  # a shared block gathers the gradients of its copies
            _, _, step, rest = name.split(".", 3)
            expected[f"model.layers.{model.config.schedule[int(step)]}.{rest}"] += parameter.grad
        else:
            expected[name] += parameter.grad
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name])


def test_blocks_and_orders_matter() -> None:
    """Otherwise the comparisons above would prove nothing."""
    logits = [shared_model(*key)(some_tokens()).logits for key in SCHEDULES]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 0.1


@torch.no_grad()
def test_every_cache_continues_what_was_read_in_pieces(pair: Pair) -> None:
    model, _ = pair
    ids = some_tokens(length=12)
    whole = model(ids, use_cache=False).logits
    for cache in caches(model):
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
            piece = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            close(piece.logits, whole[:, start:stop])
        assert len(cache) == model.config.num_steps
        assert [cache.get_seq_length(step) for step in range(len(cache))] == [12] * model.config.num_steps


@torch.no_grad()
def test_a_cache_of_its_own() -> None:
    cache = shared_model()(some_tokens(), use_cache=True).past_key_values
    assert len(cache) == 4
    assert shared_model()(some_tokens(), use_cache=False).past_key_values is None
    assert shared_model().train()(some_tokens()).past_key_values is None


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(implementation: str) -> None:
    model, ids = shared_model("reverse"), some_tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    twin = stock_twin(model, SCHEDULES["reverse", 2])
    twin.set_attn_implementation("eager")
    expected = twin(ids, attention_mask=mask).logits[:, 4:]
    model.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):  # flex attention would be compiled for seconds
        close(model(ids, attention_mask=mask).logits[:, 4:], expected)


@torch.no_grad()
def test_attention_weights() -> None:
    model, ids = shared_model("all-over"), some_tokens()
    twin = stock_twin(model, SCHEDULES["all-over", 2])
    for each in (model, twin):
        each.set_attn_implementation("eager")
    ours, theirs = (each(ids, output_attentions=True).attentions for each in (model, twin))
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its)
    with pytest.raises(ValueError, match=r"'sdpa'.*attn_implementation='eager'"):
        shared_model()(ids, output_attentions=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # the name people know
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    plain, checkpointed = shared_model("reverse").train(), shared_model("reverse").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    checkpointed.model.layers[0].input_layernorm.register_forward_hook(count)
    for model in (plain, checkpointed):
        model(some_tokens(), labels=some_tokens()).loss.backward()
    assert runs == 4  # block 0 is two of the steps, and each was computed a second time
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        close(other.grad, one.grad)


@torch.no_grad()
def test_arguments_of_forward() -> None:
    model, ids = shared_model(), some_tokens()
    logits = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([2, 7])).logits, logits[:, [2, 7]])
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    close(
        model(ids, position_ids=torch.arange(ids.shape[1])[None] + 5).logits, logits
    )  # rotation is relative
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert isinstance(shared_model(return_dict=False)(ids), tuple)
    close(as_tuple[1], logits)
    by_hand = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, SHAPE["vocab_size"]), ids[:, 1:].flatten()
    )
    close(as_tuple[0], by_hand)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


# --- generate ---

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_greedy_generation_equals_stock_without_cache(pair: Pair, options: dict[str, Any]) -> None:
    model, twin = pair
    ids = some_tokens(batch=1, length=6)
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = twin.generate(ids, use_cache=False, **common)
    assert model.generate(ids, **common, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_beams_and_samples_equal_stock(options: dict[str, Any]) -> None:
    model = shared_model("reverse", 3)
    twin, texts = stock_twin(model, SCHEDULES["reverse", 3]), []
    for each in (model, twin):
        torch.manual_seed(5)
        texts.append(each.generate(some_tokens(), max_new_tokens=8, **options).tolist())
    assert texts[0] == texts[1]


def test_assisted_generation_is_greedy_generation() -> None:
    model, ids = shared_model("all-over"), some_tokens(batch=1)
    common = {"max_new_tokens": 10, "do_sample": False}
    assisted = model.generate(ids, assistant_model=plain_model(), **common)
    assert assisted.tolist() == model.generate(ids, **common).tolist()


def test_left_padded_rows_are_what_they_are_alone(pair: Pair) -> None:
    model, _ = pair
    lengths, width = (3, 9, 6), 9
    rows = [some_tokens(1, length, seed=length) for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **common)
    for row, generated in zip(rows, together, strict=True):
        assert generated[width:].tolist() == model.generate(row, **common)[0, row.shape[1] :].tolist()
