"""Whatever the path names, one model that reads and writes text; a checkpoint says what PyTorch says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import SHAPE, exported, saved, shared

import mobilellm
from mobilellm.artefacts.text_model import open_text_model
from mobilellm.runtime.batch import ContinuousBatch
from mobilellm.sampling import Sampling

PROMPTS = ["some words", "and some more words of all kinds " * 3, ""]


@pytest.mark.parametrize("config", [SHAPE, shared("immediate", 2)], ids=["plain", "shared"])
def test_a_checkpoint_writes_what_generate_does(tmp_path: Path, config: mobilellm.ModelConfig) -> None:
    saved(tmp_path, config)
    model = open_text_model(str(tmp_path), None, pytest.fail)
    assert (model.engine.backend, model.chat_template) == ("torch", None)  # type: ignore[attr-defined]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        expected = [mobilellm.generate(tmp_path, prompt, sampling, 12)[0] for prompt in PROMPTS]
        assert [model.generate(prompt, sampling, 12)[0] for prompt in PROMPTS] == expected
        with ContinuousBatch(model, slots=2) as batch:
            requests = [batch.add(prompt, sampling, 12) for prompt in PROMPTS]
            assert [request.result() for request in requests] == expected


def test_a_session_of_a_checkpoint_reuses_what_it_read(tmp_path: Path) -> None:
    saved(tmp_path, SHAPE)
    model = open_text_model(str(tmp_path), None, pytest.fail)
    session = model.session()
    first = session.generate("some words to read", max_new_tokens=4)
    assert session.generate("some words to read", max_new_tokens=4) == first
    assert session.usage is not None
    assert session.usage.reused == session.usage.prompt - 1


def test_states_and_logits_are_the_models(tmp_path: Path) -> None:
    network = saved(tmp_path, SHAPE)
    engine = open_text_model(str(tmp_path), None, pytest.fail).engine
    tokens = np.arange(5, 25)
    logits = engine.logits(engine.forward(tokens, engine.new_cache()))
    expected = network(torch.from_numpy(tokens)[None]).detach().numpy()[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_gguf_file_and_what_is_none(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "q8_0")
    assert open_text_model(str(file), 1, pytest.fail).file is not None
    with pytest.raises(ValueError, match=r"threads = 2 is for \.gguf files"):
        open_text_model(str(tmp_path / "model"), 2, pytest.fail)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json or tokenizer\.model"):
        open_text_model(str(tmp_path / "model"), None, lambda line: None)
    with pytest.raises((ValueError, FileNotFoundError), match="nothing"):
        open_text_model(str(tmp_path / "nothing"), None, pytest.fail)
