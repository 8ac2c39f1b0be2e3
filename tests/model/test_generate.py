"""Generation: greedy is argmax by hand, batches are their rows, streams are their texts, weights are today's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import TINY, random_model, shared_model, some_tokens

import mobilellm
from mobilellm.completion import Completion, NewToken, Piece
from mobilellm.model import generate as generation
from mobilellm.model.api import LoadedModel
from mobilellm.model.generate import generate_tokens
from mobilellm.model.transformer import MobileLLM
from mobilellm.sampling import Sampler, Sampling
from mobilellm.text_stream import TextStream
from mobilellm.tokenizer import EOS_ID
from tokenizer_oracles import trained


def by_hand(model: MobileLLM, prompt: list[int], count: int) -> list[int]:
    """The argmax of a full forward pass without cache, again and again."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def rows_of(new_tokens: Iterator[NewToken], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for row, token, _ in new_tokens:
        rows[row].append(token)
    return rows


def greedy(model: MobileLLM, prompt: list[int], count: int) -> list[int]:
    return rows_of(generate_tokens(model, [prompt], max_new_tokens=count, stop_ids=()), 1)[0]


def a_prompt(length: int, seed: int = 0) -> list[int]:
    return some_tokens(TINY.vocab_size, length, seed=seed).tolist()


@pytest.mark.parametrize("how", [("immediate", 1), ("immediate", 2), ("reverse", 3)], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_is_argmax_by_hand(how: tuple[str, int], tied: bool) -> None:
    model = shared_model(*how, tie_word_embeddings=tied)
    for seed, length in enumerate((1, 2, 9)):
        prompt = a_prompt(length, seed)
        assert greedy(model, prompt, 20) == by_hand(model, prompt, 20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 12))
def test_a_batch_is_its_prompts_one_by_one(lengths: list[int], count: int) -> None:
    model = shared_model("immediate", 2, layers=2)
    prompts = [a_prompt(length, seed) for seed, length in enumerate(lengths)]
    together = rows_of(generate_tokens(model, prompts, max_new_tokens=count, stop_ids=()), len(prompts))
    assert together == [greedy(model, prompt, count) for prompt in prompts]


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model = shared_model("all-over", 2)
    prompts = [a_prompt(20), a_prompt(3, 1), a_prompt(8, 2)]
    expected = [by_hand(model, prompt, 6) for prompt in prompts]
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    assert rows_of(generate_tokens(model, prompts, max_new_tokens=6, stop_ids=()), 3) == expected


def test_a_prompt_longer_than_a_chunk() -> None:
    model = random_model(replace(TINY, max_position_embeddings=2000))
    prompts = [a_prompt(generation.PREFILL_CHUNK + 100), a_prompt(40, 1)]
    together = rows_of(generate_tokens(model, prompts, max_new_tokens=3, stop_ids=()), 2)
    assert together == [by_hand(model, prompt, 3) for prompt in prompts]


def test_stopping() -> None:
    """Rows stop each for its own reason, are not continued, and do not disturb the others."""
    model = random_model(TINY)
    prompts = [a_prompt(4), a_prompt(6, 1), a_prompt(2, 2)]
    free = [by_hand(model, prompt, 12) for prompt in prompts]
    eos = next(token for token in free[0] if token not in free[1] + free[2] and free[0].index(token) >= 2)
    until_token = next(token for token in free[1] if token not in free[2])
    asked = []

    def until(row: int, token: int) -> bool:
        asked.append((row, token))
        return row == 1 and token == until_token

    new = list(generate_tokens(model, prompts, max_new_tokens=12, stop_ids={eos}, until=until))
    ends = [free[0].index(eos) + 1, free[1].index(until_token) + 1, 12]
    for row, end in enumerate(ends):
        assert [token for r, token, _ in new if r == row] == free[row][:end]
        finishes = [finish for r, _, finish in new if r == row]
        assert finishes == [None] * (end - 1) + [("eos", "stop", "length")[row]]
    assert asked == [(row, token) for row, token, finish in new if finish != "eos"]
    order = [row for row, _, _ in new]
    by_step = zip_longest(*([row] * end for row, end in enumerate(ends)))
    assert order == [row for step in by_step for row in step if row is not None]


def test_the_context_is_filled_and_not_exceeded() -> None:
    model = random_model(replace(TINY, max_position_embeddings=16))
    prompts = [a_prompt(15), a_prompt(3, 1), a_prompt(9, 2)]
    for limit, counts in ((None, [1, 13, 7]), (13, [1, 13, 7]), (5, [1, 5, 5]), (1, [1, 1, 1])):
        new = list(generate_tokens(model, prompts, max_new_tokens=limit, stop_ids=()))
        for row, prompt in enumerate(prompts):
            tokens = [token for r, token, _ in new if r == row]
            assert tokens == by_hand(model, prompt, counts[row])
            last = [finish for r, _, finish in new if r == row][-1]
            assert last == ("length" if limit is not None and limit <= 16 - len(prompt) else "context")


@pytest.mark.parametrize(
    ("prompts", "limit", "says"),
    [
        ([], 3, "no prompt given"),
        ([[1], []], 3, "prompt 1 has no tokens"),
        ([[1]], 0, "max_new_tokens = 0 must be at least 1"),
        ([[1] * 128], 3, "prompt 0 has 128 tokens and the model's context is 128; shorten it to at most 127"),
        ([[1], [1] * 500], None, "prompt 1 has 500 tokens"),
        ([[1, 101]], 3, "prompt 0 has token ids outside the vocabulary of 101"),
        ([[-1, 3]], 3, "prompt 0 has token ids outside the vocabulary of 101"),
    ],
)
def test_bad_prompts_are_refused_at_once(prompts: list[list[int]], limit: int | None, says: str) -> None:
    """By the call itself, before anything is asked of what it returns."""
    with pytest.raises(ValueError, match=f"^generate: .*{says}") as caught:
        generate_tokens(random_model(TINY), prompts, max_new_tokens=limit)
    assert "\n" not in str(caught.value)


def test_only_ids_the_tokenizer_has_are_drawn() -> None:
    model = random_model(TINY)
    for sampling in (Sampling(), Sampling(temperature=5.0, seed=0)):
        new = generate_tokens(model, [a_prompt(4)], sampling, 60, stop_ids=(), vocabulary=10)
        assert {token for _, token, _ in new} <= set(range(10))


def test_seeds_reproduce_whatever_the_batch() -> None:
    model = random_model(TINY)
    prompts = [a_prompt(5), a_prompt(9, 1)]

    def draw(seed: int | None, *prompts: list[int]) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
        return rows_of(generate_tokens(model, prompts, sampling, 15, stop_ids=()), len(prompts))

    assert draw(1, *prompts) == draw(1, *prompts)
    assert draw(1, *prompts)[0] == draw(1, prompts[0])[0]
    assert draw(1, *prompts) != draw(2, *prompts)
    assert draw(1, prompts[0], prompts[0])[0] != draw(1, prompts[0], prompts[0])[1]
    assert draw(None, *prompts) != draw(None, *prompts)


def test_samplers_see_the_logits_and_the_history() -> None:
    """Step by step beside our own Sampler on logits without a cache; the penalty makes history matter."""
    model = random_model(TINY)
    sampling = Sampling(temperature=0.8, top_k=30, repetition_penalty=1.5, seed=3)
    tokens = prompt = a_prompt(6)
    sampler = Sampler(sampling, prompt)
    for _, token, _ in generate_tokens(model, [prompt], sampling, 25, stop_ids=()):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]))[0, -1].numpy()
        assert sampler(logits) == token
        tokens = [*tokens, token]


def test_two_generations_can_take_turns() -> None:
    model = random_model(TINY)
    prompts = [a_prompt(5), a_prompt(8, 1)]
    runs = [generate_tokens(model, [prompt], max_new_tokens=10, stop_ids=()) for prompt in prompts]
    turns = [[new.token for new in step] for step in zip(*runs, strict=True)]
    assert [list(row) for row in zip(*turns, strict=True)] == [by_hand(model, p, 10) for p in prompts]


def test_the_consumer_keeps_its_own_gradient_mode() -> None:
    model = random_model(TINY)
    for _ in generate_tokens(model, [a_prompt(3)], max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    model(torch.tensor([a_prompt(5)])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_broken_weights_are_said() -> None:
    model = random_model(TINY)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the logits hold nan"):
        next(generate_tokens(model, [a_prompt(3)]))


# Weights change between two generations


def in_place(model: MobileLLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


def through_data(model: MobileLLM) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


def one_row_through_data(model: MobileLLM) -> None:
    """The smallest change that can matter: the row of the token that comes first now."""
    row = by_hand(model, PROMPT, 1)[0]
    model.head_weight.data[row] *= -1


def by_optimizer(model: MobileLLM, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=fused, foreach=not fused)
    model(torch.tensor([a_prompt(30)])).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_optimizer(model: MobileLLM) -> None:
    by_optimizer(model, fused=True)


def foreach_optimizer(model: MobileLLM) -> None:
    by_optimizer(model, fused=False)


def copied_state(model: MobileLLM) -> None:
    model.load_state_dict(random_model(model.config, 8, model.head_weight.dtype).state_dict())


def assigned_state(model: MobileLLM) -> None:
    state = random_model(model.config, 8, model.head_weight.dtype).state_dict()
    model.load_state_dict(state, assign=True)


def many_assigned_states(model: MobileLLM) -> None:
    """Freed memory is given out again: a new weight may lie where the old one lay."""
    for seed in range(6):
        state = random_model(model.config, seed + 20, model.head_weight.dtype).state_dict()
        model.load_state_dict(state, assign=True)


def another_parameter(model: MobileLLM) -> None:
    projection = model.get_submodule("model.layers.0.self_attn.o_proj")
    projection.weight = torch.nn.Parameter(-3 * projection.get_parameter("weight").detach())


def swapped_data(model: MobileLLM) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).clone()


def through_numpy(model: MobileLLM) -> None:
    for parameter in model.parameters():
        parameter.detach().view(torch.int16).numpy()[...] ^= -(2**15)  # the sign of some


def another_dtype(model: MobileLLM) -> None:
    in_place(model)
    model.to(torch.float16 if model.head_weight.dtype == torch.bfloat16 else torch.float64)


PROMPT = a_prompt(6)
CHANGES = (
    in_place,
    through_data,
    one_row_through_data,
    fused_optimizer,
    foreach_optimizer,
    copied_state,
    assigned_state,
    many_assigned_states,
    another_parameter,
    swapped_data,
    through_numpy,
    another_dtype,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_used(
    change: Callable[[MobileLLM], None], tied: bool, dtype: torch.dtype
) -> None:
    model = random_model(replace(TINY, tie_word_embeddings=tied), 5, dtype)
    before = greedy(model, PROMPT, 12)
    change(model)
    assert model.inference_layout is not None
    fresh = copy.deepcopy(model)
    assert fresh.inference_layout is None
    expected = greedy(fresh, PROMPT, 12)
    assert expected != before
    assert greedy(model, PROMPT, 12) == expected
    if model.head_weight.dtype in (torch.float32, torch.float64):
        assert expected == by_hand(model, PROMPT, 12)


def test_unchanged_weights_are_laid_out_once() -> None:
    model = random_model(TINY)
    greedy(model, PROMPT, 2)
    layout = model.inference_layout
    greedy(model, PROMPT, 2)
    assert model.inference_layout is layout


def test_a_model_made_in_inference_mode_generates() -> None:
    with torch.inference_mode():
        model = random_model(TINY)
    assert greedy(model, PROMPT, 5) == by_hand(model, PROMPT, 5)
    with torch.inference_mode():
        in_place(model)
    assert greedy(model, PROMPT, 5) == by_hand(model, PROMPT, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_generated_can_be_copied_and_pickled(dtype: torch.dtype) -> None:
    model = random_model(TINY, 0, dtype)
    expected = greedy(model, PROMPT, 8)
    names = list(model.state_dict())
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == names
        assert greedy(other, PROMPT, 8) == expected
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    twin = copy.deepcopy(model)
    in_place(twin)
    assert greedy(model, PROMPT, 8) == expected
    assert greedy(twin, PROMPT, 8) != expected


# Text in, text out


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer = trained()
    config = replace(TINY, vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
    return LoadedModel(random_model(config, 2), tokenizer, "a test")


PROMPTS = ["The cache", "", "def f(x):\n    return", "héllo 🙂"]
SAMPLINGS = [Sampling(), Sampling(temperature=1.0, seed=4), Sampling(temperature=2.0, min_p=0.01, seed=5)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_streamed_text_is_the_completion(loaded: LoadedModel, sampling: Sampling) -> None:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    pieces = list(loaded.stream(PROMPTS, sampling, 30))
    completions = mobilellm.generate(loaded, PROMPTS, sampling, 30)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        mine = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in mine) == completion.text
        assert [piece.token for piece in mine] == completion.tokens
        assert [piece.finish for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish == completion.finish
        assert prompt + completion.text == tokenizer.decode(tokenizer.encode(prompt) + completion.tokens)
        for piece in mine[:-1]:
            assert "\ufffd" not in piece.text or "\ufffd" in completion.text


def test_one_prompt_or_several(loaded: LoadedModel) -> None:
    several = mobilellm.generate(loaded, PROMPTS, max_new_tokens=10)
    assert several == [mobilellm.generate(loaded, prompt, max_new_tokens=10)[0] for prompt in PROMPTS]
    assert all(isinstance(completion, Completion) for completion in several)
    assert isinstance(next(loaded.stream("x")), Piece)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_stop_strings_cut_the_text(loaded: LoadedModel, data: st.DataObject) -> None:
    """Any piece of the free text as a stop string: the text ends before its first occurrence."""
    sampling = Sampling(temperature=1.0, seed=data.draw(st.integers(0, 5)))
    free = mobilellm.generate(loaded, "The", sampling, 25)[0]
    start = data.draw(st.integers(0, len(free.text) - 1))
    stops = [free.text[start : start + data.draw(st.integers(1, 6))], "this is not there"]
    got = mobilellm.generate(loaded, "The", sampling, 25, stops)[0]
    assert got.text == free.text[: free.text.index(stops[0])]
    assert got.finish == "stop" or (got.finish == free.finish and "\ufffd" in stops[0])
    assert got.tokens == free.tokens[: len(got.tokens)]
    stream = TextStream(loaded.tokenizer, stops)  # type: ignore[arg-type]
    for token in got.tokens[:-1]:
        stream.push(token)
        assert not stream.stopped


def test_an_unfinished_stop_string_is_shown_at_the_end(loaded: LoadedModel) -> None:
    free = mobilellm.generate(loaded, "The", max_new_tokens=8)[0]
    got = mobilellm.generate(
        loaded, "The", max_new_tokens=8, stop=[free.text + "never", free.text[-2:] + "\0"]
    )
    assert got == [free]


def test_eos_ends_a_text_and_is_no_part_of_it(loaded: LoadedModel) -> None:
    free = mobilellm.generate(loaded, ["The cache", "x"], max_new_tokens=10)
    wanted = next(token for token in free[0].tokens if token not in free[1].tokens and token != EOS_ID)
    model = copy.deepcopy(loaded.model)
    assert model.lm_head is not None
    with torch.no_grad():  # the token that came there is called </s> from now on
        model.lm_head.weight[[EOS_ID, wanted]] = model.lm_head.weight[[wanted, EOS_ID]]
    end = free[0].tokens.index(wanted)
    renamed = mobilellm.generate(replace(loaded, model=model), ["The cache", "x"], max_new_tokens=10)
    assert renamed[0].tokens == [*free[0].tokens[:end], EOS_ID]
    assert renamed[0].finish == "eos"
    assert "</s>" not in renamed[0].text
    assert free[0].text.startswith(renamed[0].text.removesuffix("\ufffd"))
    assert renamed[1] == free[1]


def test_an_embedding_larger_than_the_tokenizer(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    config = replace(loaded.model.config, vocab_size=10 * tokenizer.vocab_size)
    padded = LoadedModel(random_model(config), tokenizer, "padded")
    got = mobilellm.generate(padded, PROMPTS, Sampling(temperature=3.0, seed=0), 20)
    assert max(token for completion in got for token in completion.tokens) < tokenizer.vocab_size


def test_text_that_cannot_be_completed(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="prompt 1 has .* tokens and the model's context is 128"):
        loaded.stream(["x", "word " * 500])
    with pytest.raises(ValueError, match="no prompt given"):
        mobilellm.generate(loaded, [])
    with pytest.raises(FileNotFoundError, match="bare: has no tokenizer"):
        LoadedModel(loaded.model, None, "bare").stream("x")
    for stop in ("a string", [""]):
        with pytest.raises(ValueError, match="stop"):
            loaded.stream("x", stop=stop)
    for prompts in ([3], ["\ud800"]):
        with pytest.raises(ValueError, match="text 0 is"):
            loaded.stream(prompts)  # type: ignore[arg-type]
