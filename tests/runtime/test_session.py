from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import SHAPE, exported, shared, small_tokenizer

import mobilellm.runtime
from mobilellm.config import ModelConfig
from mobilellm.model.api import load as load_in_torch
from mobilellm.sampling import Sampling

PROMPTS = ["some words", "", "and some more words of all kinds to read"]


@pytest.mark.parametrize("config", [SHAPE, shared("immediate", 2)])
def test_text_is_that_of_the_model_in_torch(tmp_path: Path, config: ModelConfig) -> None:
    file, _ = exported(tmp_path, "F32", config)
    ours, theirs = mobilellm.runtime.load(file), load_in_torch(tmp_path / "model")
    assert ours.generate(PROMPTS, max_new_tokens=30) == mobilellm.generate(theirs, PROMPTS, max_new_tokens=30)


def test_a_model_is_shown_in_a_line(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    model = mobilellm.runtime.load(file)
    assert model.file
    assert repr(model) == f"<RuntimeModel of {str(file)!r}: NativeModel>"
    assert (
        repr(model.file)
        == f"<GGUF {str(file)!r}: {len(model.file.tensors)} tensors, {file.stat().st_size:,} bytes>"
    )


def test_sampling_draws_the_same_with_the_same_seed(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    ours, theirs = mobilellm.runtime.load(file), load_in_torch(tmp_path / "model")
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3)
    drawn = ours.generate(PROMPTS, sampling, 20)
    assert drawn == ours.generate(PROMPTS, sampling, 20)
    assert [each.text for each in drawn] == [
        each.text for each in mobilellm.generate(theirs, PROMPTS, sampling, 20)
    ]


def test_several_prompts_at_once_are_each_alone(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "Q8_0")
    ours = mobilellm.runtime.load(file)
    together = ours.generate(PROMPTS, max_new_tokens=20)
    assert together == [ours.generate(prompt, max_new_tokens=20)[0] for prompt in PROMPTS]


def test_it_stops_at_a_text_and_at_the_end_of_the_context(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    ours = mobilellm.runtime.load(file)
    (whole,) = ours.generate("some", sampling=Sampling(temperature=1.0, seed=1))
    assert whole.finish in ("context", "eos")
    stop = whole.text[3:5]
    (cut,) = ours.generate("some", Sampling(temperature=1.0, seed=1), stop=[stop])
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_prompts_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F32")
    ours = mobilellm.runtime.load(file)
    with pytest.raises(ValueError, match="the model's context is 96; shorten it to at most 95"):
        ours.stream("x" * 500)
    with pytest.raises(ValueError, match="max_new_tokens = 0 must be at least 1"):
        ours.stream("x", max_new_tokens=0)


def test_the_tokenizer_comes_back_out_of_the_file(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "F16")
    tokenizer = mobilellm.runtime.load(file).tokenizer
    assert tokenizer.fingerprint == small_tokenizer().fingerprint


def test_running_a_file_needs_no_torch(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "Q4_0")
    code = (
        f"import sys, mobilellm.runtime; mobilellm.runtime.load({str(file)!r}).generate('some', max_new_tokens=2);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
