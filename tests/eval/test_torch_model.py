"""The fast scorer gives what a plain forward pass gives, one request at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.eval import torch_model as module
from mobilellm.eval import tree_scoring
from mobilellm.eval.interface import LanguageModel, Likelihood, Request
from mobilellm.eval.prefix_tree import grow
from mobilellm.eval.torch_model import TorchModel, fingerprint, torch_model
from mobilellm.model import checkpoint
from mobilellm.model.api import LoadedModel, generate
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import BOS_ID, Tokenizer
from model.random_models import SHARED, TINY, random_model, shared_model
from tokenizer_oracles import trained

CONTEXT = TINY.max_position_embeddings


@cache
def tokenizer() -> Tokenizer:
    return trained()


def scorer(model: MobileLLM, tokens_at_once: int | None = None) -> TorchModel:
    return torch_model(LoadedModel(model, tokenizer(), "a model"), tokens_at_once)


@cache
def tiny() -> MobileLLM:
    return random_model(TINY)


def some_requests(count: int, seed: int = 0, vocabulary: int = TINY.vocab_size) -> list[Request]:
    """Groups of one to four that share a context, of all lengths, a few of them twice."""
    draw = random.Random(seed)

    def some(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(length))

    requests: list[Request] = []
    while len(requests) < count:
        context = some(draw.choice([1, 2, 5, 12, 40]))
        stem = some(draw.choice([0, 0, 3]))
        requests += [
            Request(context, stem + some(draw.choice([1, 1, 2, 4, 9]))) for _ in range(draw.randint(1, 4))
        ]
        if draw.random() < 0.2:
            requests.append(draw.choice(requests))
    return requests[:count]


def answered(model: TorchModel, requests: Sequence[Request]) -> list[Likelihood]:
    found = list(model.log_likelihoods(requests))
    assert sorted(number for number, _ in found) == list(range(len(requests)))
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


def alone(model: MobileLLM, request: Request) -> Likelihood:
    """In float64, the whole request in one row, every logit computed."""
    tokens = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        logits = model(tokens)[0, len(request.context) - 1 : -1].to(torch.float64)
    chosen = logits.log_softmax(-1).gather(1, tokens[0, len(request.context) :, None])[:, 0]
    greedy = logits.argmax(-1).tolist() == list(request.continuation)
    return Likelihood(chosen.numpy(), greedy)


def assert_as_alone(model: MobileLLM, requests: list[Request], tokens_at_once: int | None = None) -> None:
    exact = random_twin(model).double()
    found = answered(scorer(model, tokens_at_once), requests)
    for request, answer in zip(requests, found, strict=True):
        wanted = alone(exact, request)
        assert answer.tokens.dtype == np.float32
        np.testing.assert_allclose(answer.tokens, wanted.tokens, atol=1e-4, rtol=0)
        assert answer.greedy == wanted.greedy
        assert answer.total == pytest.approx(wanted.tokens.sum(), abs=1e-3)


def random_twin(model: MobileLLM) -> MobileLLM:
    twin = MobileLLM(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def likeliest(model: MobileLLM, context: tuple[int, ...], length: int) -> tuple[int, ...]:
    """What greedy decoding gives, token by token."""
    fed = list(context)
    for _ in range(length):
        with torch.no_grad():
            fed.append(int(model(torch.tensor([fed]))[0, -1].argmax()))
    return tuple(fed[len(context) :])


@pytest.mark.parametrize("tokens_at_once", [None, 1, 50, 300])
def test_equals_a_forward_pass_for_each_request(tokens_at_once: int | None) -> None:
    requests = some_requests(60)
    contexts = {request.context for request in requests[:8]}
    requests += [Request(context, likeliest(tiny(), context, 3)) for context in contexts]
    assert_as_alone(tiny(), requests, tokens_at_once)
    assert sum(answer.greedy for answer in answered(scorer(tiny()), requests)) >= len(contexts)


@pytest.mark.parametrize(("order", "repeats"), SHARED)
def test_every_order_of_layer_sharing(order: str, repeats: int) -> None:
    assert_as_alone(shared_model(order, repeats), some_requests(12))


def test_a_head_of_its_own() -> None:
    assert_as_alone(random_model(replace(TINY, tie_word_embeddings=False)), some_requests(12))


def test_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_scoring, "LOGITS_AT_ONCE", 3 * TINY.vocab_size)
    assert_as_alone(tiny(), some_requests(30))


def test_contexts_as_long_as_the_model_takes() -> None:
    whole = some_requests(1, seed=1)[0].context[:1] + tuple(range(50)) * 3
    fits = [Request(whole[:1], whole[1 : CONTEXT + 1]), Request(whole[: CONTEXT - 2], (5, 6, 7))]
    assert_as_alone(tiny(), fits + some_requests(5), tokens_at_once=64)
    for context, continuation in ((whole[:1], whole[1 : CONTEXT + 2]), (whole[: CONTEXT + 1], (5,))):
        with pytest.raises(ValueError, match=f"feeds {CONTEXT + 1} tokens .* context is {CONTEXT}; shorten"):
            scorer(tiny()).log_likelihoods([fits[0], Request(context, continuation)])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_answers_do_not_depend_on_what_else_is_asked(seed: int, tokens_at_once: int) -> None:
    requests = some_requests(20, seed)
    whole = answered(scorer(tiny()), requests)
    shuffled = random.Random(seed).sample(range(20), 20)
    again = answered(scorer(tiny(), tokens_at_once), [requests[number] for number in shuffled])
    for number, answer in zip(shuffled, again, strict=True):
        np.testing.assert_allclose(answer.tokens, whole[number].tokens, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arithmetic", ["as here", "bfloat16"])
def test_bfloat16_weights(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same weights in float64. Rounded products drift no further than a plain forward pass."""
    if arithmetic == "bfloat16":
        monkeypatch.setattr(module, "_for_arithmetic", lambda model: model)
    model = random_model(TINY, dtype=torch.bfloat16)
    requests = some_requests(60)
    exact = [alone(random_twin(model).double(), request) for request in requests]

    def drift(found: list[Likelihood]) -> float:
        return max(float(np.abs(a.tokens - b.tokens).max()) for a, b in zip(found, exact, strict=True))

    ours = drift(answered(scorer(model), requests))
    plain = drift([Likelihood(*alone(model, request)) for request in requests])
    print(f"furthest a token's log-likelihood drifts, {arithmetic}: {ours:.4f} nats; plain {plain:.4f}")
    assert ours < 1.5 * plain
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() and arithmetic == "as here":
        assert ours < 1e-4
        assert scorer(model).identity.dtype == "bfloat16 (computed in float32)"


def test_of_equal_logits_the_first_is_greedy() -> None:
    model = random_twin(tiny())
    with torch.no_grad():  # every odd id is the twin of the even one before it
        model.model.embed_tokens.weight[1::2] = model.model.embed_tokens.weight[:-1:2]
    (best,) = likeliest(model, (40, 7), 1)
    assert best % 2 == 0
    first, second = answered(scorer(model), [Request((40, 7), (best,)), Request((40, 7), (best + 1,))])
    assert first.total == second.total
    assert first.greedy
    assert not second.greedy


def test_answers_come_as_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    def counted(*arguments: Any) -> list[tuple[int, Likelihood]]:
        nonlocal passes
        passes += 1
        return tree_scoring.answers(*arguments)

    monkeypatch.setattr(module, "answers", counted)
    stream = scorer(tiny(), 100).log_likelihoods(some_requests(200))
    assert passes == 0
    next(stream)
    assert passes == 1
    list(stream)
    assert passes > 10


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 400))
def test_batches_hold_every_tree_and_little_padding(seed: int, tokens_at_once: int) -> None:
    trees = list(grow(some_requests(50, seed), CONTEXT, 500.0))
    batches = list(module._batches(trees, tokens_at_once))
    assert sorted(id(tree) for batch in batches for tree in batch) == sorted(map(id, trees))
    for batch in batches:
        fed = len(batch) * len(batch[0])
        assert len(batch[0]) == max(map(len, batch))
        assert len({tree.is_chain for tree in batch}) == 1
        assert fed <= tokens_at_once or len(batch) == 1
        assert fed - sum(map(len, batch)) <= tokens_at_once // 32


def test_what_cannot_be_asked_is_refused_at_once() -> None:
    good, model = Request((1, 2), (3,)), scorer(tiny())
    for bad, complaint in (
        (Request((), (3,)), "empty context; both hold"),
        (Request((3,), ()), "empty continuation"),
        (Request((3,), (101,)), "token id 101 .* vocabulary of 101"),
        (Request((-1,), (4,)), "token id -1 "),
    ):
        with pytest.raises(ValueError, match=complaint):
            model.log_likelihoods([good, bad])
    assert list(model.log_likelihoods([])) == []
    with pytest.raises(FileNotFoundError, match="a model: has no tokenizer"):
        torch_model(LoadedModel(tiny(), None, "a model"))
    with pytest.raises(ValueError, match="tokens_at_once = 0"):
        scorer(tiny(), 0)


def test_texts() -> None:
    model: LanguageModel = scorer(tiny())
    assert model.context == CONTEXT
    assert model.encode(["a text", ""]) == [tokenizer().encode("a text"), [model.bos]]
    assert model.encode(["a text"], special=False) == [tokenizer().encode("a text", bos=False)]
    assert model.encode_with_places("é text") == tokenizer().encode_with_starts("é text")


@cache
def speaker() -> MobileLLM:
    """Knows every id of the tokenizer."""
    return random_model(replace(preset("test-ls"), vocab_size=tokenizer().vocab_size))


def test_greedy_text() -> None:
    prompts = [f"{'word ' * count}end" for count in (3, 1, 30, 2)]
    loaded = LoadedModel(speaker(), tokenizer(), "a model")
    model = torch_model(loaded)
    plain = [generate(loaded, prompt, max_new_tokens=12)[0] for prompt in prompts]
    encoded = model.encode(prompts)
    assert model.greedy(encoded, [], 12) == plain
    assert all(completion.text for completion in plain)
    stop = plain[0].text[2:4]
    stopped = [generate(loaded, prompt, max_new_tokens=12, stop=[stop])[0] for prompt in prompts]
    assert model.greedy(encoded, [stop], 12) == stopped != plain
    assert model.greedy([], [], 12) == []
    with pytest.raises(ValueError, match=r"prompt 1 has 128 tokens; give 1 … 127"):
        model.greedy([[BOS_ID], [BOS_ID] * 128], [], 1)


def test_greedy_flag_is_what_decoding_gives() -> None:
    model = torch_model(LoadedModel(speaker(), tokenizer(), "a model"))
    prompt = model.encode(["word end"])[0]
    text = model.greedy([prompt], [], 8)[0].text
    ids = likeliest(speaker(), tuple(prompt), 8)
    assert tokenizer().decode([*prompt, *ids]).endswith(text)
    (answer,) = answered(model, [Request(tuple(prompt), ids)])
    assert answer.greedy


def test_identity() -> None:
    identity = scorer(tiny()).identity
    assert (identity.name, identity.backend) == ("a model", "mobilellm")
    assert (identity.dtype, identity.device) == ("float32", "cpu")
    assert identity.parameters == sum(weight.numel() for weight in tiny().parameters())
    assert identity.bytes == 4 * identity.parameters
    assert identity.config == TINY.to_dict()
    assert identity.fingerprint == fingerprint(random_model(TINY), tokenizer())


def test_fingerprint_tells_models_apart() -> None:
    other = random_model(TINY)
    with torch.no_grad():
        other.model.norm.weight[-1] += 1e-6
    prints = {
        fingerprint(tiny(), tokenizer()),
        fingerprint(other, tokenizer()),
        fingerprint(random_model(TINY, dtype=torch.bfloat16), tokenizer()),
        fingerprint(random_model(replace(TINY, rope_theta=5e5)), tokenizer()),
        fingerprint(tiny(), Tokenizer.train([Path(__file__).read_text("utf-8")], 600)),
    }
    assert len(prints) == 5


def test_equals_the_hugging_face_backend_of_lm_eval(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = random_model(replace(preset("test"), vocab_size=tokenizer().vocab_size))
    checkpoint.save(tmp_path / "model", model, tokenizer(), "llama")
    theirs = huggingface.HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=3)
    requests = some_requests(40, vocabulary=tokenizer().vocab_size)
    requests.append(Request((1, 5), likeliest(model, (1, 5), 4)))
    asked = [(("", ""), list(context), list(continuation)) for context, continuation in requests]
    wanted = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    found = answered(scorer(model), requests)
    for answer, (total, greedy) in zip(found, wanted, strict=True):
        assert answer.total == pytest.approx(total, abs=1e-3)
        assert answer.greedy == greedy
    assert any(greedy for _, greedy in wanted)
