from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from quantized_models import SHAPE, SPELLINGS, rounded, shared, small_tokenizer

from mobilellm.eval.torch_model import TorchModel
from mobilellm.quant.compare import Judge, matrix_errors, windows

TEXT = "some words to read, and some more words of all kinds; the end. " * 30


@torch.no_grad()
@pytest.mark.parametrize("name", ["8da4w", "q4_0, embedding q8_0", "w8a8, kv"])
def test_the_numbers_are_those_of_their_definitions(name: str) -> None:
    source, _, made = rounded(SPELLINGS[name], shared("immediate", 2))
    model = TorchModel(source, small_tokenizer(), "random", 1_024)
    units = windows(model, [TEXT], 50, 10**6)
    ids = model.encode([TEXT])[0]
    found = Judge(source, units)(made)
    kl = agreed = count = 0.0
    nats = [0.0, 0.0]
    for start in range(0, len(ids) - 1, 49):
        window = torch.tensor(ids[start : start + 50])
        logits = [part(window[None, :-1])[0].double() for part in (source, made)]
        for number, each in enumerate(logits):
            nats[number] += float(F.cross_entropy(each, window[1:], reduction="sum"))
        p, q = (each.softmax(-1) for each in logits)
        kl += float((p * (p / q).log()).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(window) - 1
    assert found.tokens == count == len(ids) - 1
    assert found.bytes == len(TEXT)
    # The other way through the model sums in another order, after which roundings may fall to the other side.
    assert found.source_perplexity == pytest.approx(math.exp(nats[0] / count), rel=1e-4)
    assert found.quantized_perplexity == pytest.approx(math.exp(nats[1] / count), rel=5e-3)
    assert found.kl == pytest.approx(kl / count, rel=0.1)
    assert found.agreement == pytest.approx(agreed / count, abs=0.02)
    numbers = found.to_dict()
    assert numbers["source"]["bits_per_byte"] == pytest.approx(nats[0] / math.log(2) / len(TEXT), rel=1e-4)


@torch.no_grad()
def test_errors_are_of_each_product_on_its_own_input() -> None:
    source, _, made = rounded(SPELLINGS["8da4w"])
    model = TorchModel(source, small_tokenizer(), "random", 1_024)
    units = windows(model, [TEXT], 60, 60)
    assert len(units) == 1
    errors = matrix_errors(source, made, units)
    assert len(errors) == 7 * SHAPE.num_layers + 1
    ids = torch.tensor([[*units[0].requests[0].context, *units[0].requests[0].continuation]])
    hidden = source.hidden(ids)
    exact, found = source.logits(hidden), made.logits(hidden)
    expected = float((found - exact).norm() / exact.norm())
    assert errors["model.embed_tokens.weight"] == pytest.approx(expected, rel=1e-4)
    first = source.model.layers[0]
    x = first.input_layernorm(F.embedding(ids, source.model.embed_tokens.weight))
    exact, found = (part.model.layers[0].self_attn.k_proj(x) for part in (source, made))
    expected = float((found - exact).norm() / exact.norm())
    assert errors["model.layers.0.self_attn.k_proj.weight"] == pytest.approx(expected, rel=1e-4)


def test_nothing_is_lost_against_itself() -> None:
    source, _, _ = rounded(SPELLINGS["int8"])
    model = TorchModel(source, small_tokenizer(), "random", 1_024)
    found = Judge(source, windows(model, [TEXT], 50, 200))(copy.deepcopy(source))
    assert (found.kl, found.agreement, set(found.errors.values())) == (0, 1, {0})
    assert found.to_dict()["perplexity_ratio"] == 1


def test_windows_are_spread_over_all_texts() -> None:
    source, _, _ = rounded(SPELLINGS["int8"])
    model = TorchModel(source, small_tokenizer(), "random", 1_024)
    every = windows(model, [TEXT, "other words. " * 40], 30, 10**6)
    some = windows(model, [TEXT, "other words. " * 40], 30, 29 * 5)
    assert len(some) == 5
    places = [every.index(unit) for unit in some]
    assert places == sorted(set(places))
    assert places[0] < len(every) / 4
    assert places[-1] > 3 * len(every) / 4
