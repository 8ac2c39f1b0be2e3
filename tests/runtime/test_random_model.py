"""Files of random weights: of the shape and type they are named for, readable, always the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mobilellm.runtime
from mobilellm.gguf import read_gguf
from mobilellm.gguf_model import read_config
from mobilellm.gguf_tokenizer import read_tokenizer
from mobilellm.presets import preset
from mobilellm.runtime.random_model import made_tokenizer, shape_and_type, write_random_model


def test_a_file_has_the_shape_and_type_of_its_name(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m.gguf", "test-ls", "Q4_0")
    file = read_gguf(tmp_path / "m.gguf")
    config = read_config(file)
    assert replace(config, rms_norm_eps=1e-5) == preset("test-ls")  # the file has it in float32
    assert set(file.bytes_by_type) == {"Q4_0", "F32", "F16"}  # rows of 176 are no multiple of 32
    assert read_tokenizer(file).vocab_size == preset("test-ls").vocab_size
    write_random_model(tmp_path / "again.gguf", "test-ls", "Q4_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_it_writes_text_and_numbers_stay_numbers(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m.gguf", "test", "F32")
    model = mobilellm.runtime.load(tmp_path / "m.gguf", engine="reference")
    states = model.engine.forward(np.arange(3, 103), model.engine.new_cache())
    logits = model.engine.logits(states)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    assert len(model.generate("a fox", max_new_tokens=5)[0].tokens) == 5


@pytest.mark.parametrize("size", [260, 285, 286, 287, 300, 4096])
def test_a_vocabulary_of_any_size(size: int) -> None:
    tokenizer = made_tokenizer(size)
    assert tokenizer.vocab_size == size
    text = "the quick brown fox, 12 é\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.scores()) == size


def test_what_is_no_name_is_said() -> None:
    assert shape_and_type("125m:q8_0") == ("125m", "Q8_0")
    with pytest.raises(ValueError, match="no room"):
        made_tokenizer(259)
    for name, message in [
        ("model.bin", "'model.bin' is no file; for random weights write SHAPE:TYPE"),
        ("126m:Q8_0", "preset '126m' is not known"),
        ("125m:Q5_K", "type 'Q5_K' is not known; choose one of F32, F16"),
    ]:
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            shape_and_type(name)
