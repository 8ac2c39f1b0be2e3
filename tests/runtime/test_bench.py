"""The engine as a contestant: what it is fed, from where it goes on, what it says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE, exported, shared

from mobilellm.accounting import kv_cache_bytes_per_token
from mobilellm.config import ModelConfig
from mobilellm.gguf import read_gguf
from mobilellm.runtime import engine
from mobilellm.runtime.bench import RuntimeContestant, describe, fed_tokens

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("bench"), "Q8_0")[0]


def test_decoding_goes_on_after_the_depth_and_is_fed_the_same_each_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contestant = RuntimeContestant(str(file), 2, 60)
    fed: list[tuple[int, list[int]]] = []
    forward = engine.NativeModel.forward

    def watched(model: engine.NativeModel, tokens: np.ndarray, cache: engine.NativeCache) -> np.ndarray:
        fed.append((cache.length, tokens.tolist()))
        return forward(model, tokens, cache)

    monkeypatch.setattr(engine.NativeModel, "forward", watched)
    tokens = fed_tokens(60, SHAPE.vocab_size).tolist()
    singles = [(place, [tokens[place]]) for place in range(50, 55)]
    assert contestant.decode(50, 5) > 0
    assert fed == [(0, tokens[:50]), *singles]
    fed.clear()
    contestant.decode(50, 5)  # what is there stays there
    assert fed == singles
    fed.clear()
    contestant.decode(0, 2)
    assert contestant.prefill(40) > 0
    assert fed == [(0, [tokens[0]]), (1, [tokens[1]]), (0, tokens[:40])]


def test_fed_tokens_are_in_any_vocabulary_and_differ() -> None:
    for vocabulary in (260, 384, 32_000):
        tokens = fed_tokens(2048, vocabulary)
        assert tokens.min() >= 3
        assert tokens.max() < vocabulary
        assert (np.diff(tokens) != 0).all()


def test_memory_is_read_at_a_rate_that_memory_has(file: Path) -> None:
    assert 2e8 < RuntimeContestant(str(file), 2, 8).read_memory() < 2e12


@pytest.mark.parametrize("config", [SHAPE, shared("immediate", 2)], ids=["plain", "shared"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_tells_what_a_token_reads(tmp_path: Path, config: ModelConfig, tied: bool) -> None:
    from dataclasses import replace

    config = replace(config, tie_word_embeddings=tied)
    path, model = exported(tmp_path, "F16", config)
    described = describe(path)
    assert described["model_n_params"] == sum(each.numel() for each in model.parameters())
    assert described["model_size"] <= path.stat().st_size
    embedding = 2 * config.vocab_size * config.hidden_size
    assert described["bytes_per_token"] == described["model_size"] - (0 if tied else embedding)
    assert described["cache_bytes_per_token"] == kv_cache_bytes_per_token(config)
    architecture = read_gguf(path).metadata["general.architecture"]
    assert described["model_type"] == f"{architecture} F16"
