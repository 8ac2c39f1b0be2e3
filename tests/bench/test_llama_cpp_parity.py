"""Our files in llama.cpp and its files in our runtime: the same text, the same ids, the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE, exported, shared
from llama_cpp_oracle import encode, greedy, llama_cpp, logits, opened, quantise

import mobilellm.runtime
from mobilellm.bench.cold_start import PROMPT
from mobilellm.bench.entries import Entry, write_unrolled
from mobilellm.bench.starts import cold_starts
from mobilellm.bench.worker import Worker, WorkerError
from mobilellm.config import ModelConfig
from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import TYPES
from mobilellm.gguf_model import Roles, write_model
from mobilellm.runtime.random_model import random_weights
from mobilellm.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

LONG = replace(SHAPE, max_position_embeddings=256)
TOKENS = np.random.default_rng(0).integers(3, 300, 120)
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
TOLERANCE = {"F32": 1e-3, "F16": 2e-3, "BF16": 1.2e-2, "Q8_0": 4e-2, "Q4_0": 4e-2}
"""Of the difference of logits, root mean square, in their spread. llama.cpp rounds activations to the file's type,
and to 8 bits with another scale than ours: one number that falls to the other side moves all after it, and two
such roundings are as far from each other as each is from none (2 % in a model as narrow as this)."""


def apart(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.sqrt(np.mean((theirs - ours) ** 2)) / ours.std())


def our_logits(file: Path) -> np.ndarray:
    engine = mobilellm.runtime.load(file).engine
    return engine.logits(engine.forward(TOKENS, engine.new_cache()))


def assert_greedy_text_is_the_same(
    file: Path, theirs: llama_cpp.Llama, prompt: list[int], count: int
) -> None:
    model = mobilellm.runtime.load(file)
    ours = [each.token for each in model.generate_tokens([prompt], max_new_tokens=count)]
    assert len(ours) > 20
    assert greedy(theirs, prompt, count, model.tokenizer.vocab_size) == ours


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_files_compute_the_same_in_llama_cpp(tmp_path: Path, kind: str, tied: bool) -> None:
    file, _ = exported(tmp_path, kind, replace(LONG, tie_word_embeddings=tied))
    ours = our_logits(file)
    with opened(file) as theirs:
        assert apart(logits(theirs, TOKENS), ours) < TOLERANCE[kind]
        if kind == "F32":
            assert_greedy_text_is_the_same(file, theirs, [1, *range(20, 30)], 200)


@pytest.mark.parametrize("kind", KINDS)
def test_its_quantiser_makes_our_bytes(tmp_path: Path, kind: str) -> None:
    full, _ = exported(tmp_path / "full", "F32", LONG)
    ours, _ = exported(tmp_path / "ours", kind, LONG)
    quantise(full, tmp_path / "theirs.gguf", kind, pure=True)
    mine, others = read_gguf(ours), read_gguf(tmp_path / "theirs.gguf")
    assert mine.tensors.keys() == others.tensors.keys()
    for name in mine.tensors:
        assert mine.tensors[name].type == others.tensors[name].type, name
        np.testing.assert_array_equal(mine.raw(name), others.raw(name), err_msg=name)
    assert ours.stat().st_size <= (tmp_path / "theirs.gguf").stat().st_size
    np.testing.assert_array_equal(our_logits(ours), our_logits(tmp_path / "theirs.gguf"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_files_of_its_quantiser_run_as_they_come(tmp_path: Path, kind: str) -> None:
    """By default it gives the head a better type, which for rows that 256 does not divide is Q8_0."""
    full, _ = exported(tmp_path, "F32", LONG)
    file = tmp_path / "theirs.gguf"
    quantise(full, file, kind, pure=False)
    ours = our_logits(file)
    with opened(file) as theirs:
        assert apart(logits(theirs, TOKENS), ours) < TOLERANCE[kind]


@pytest.mark.parametrize("order", ["immediate", "all-over", "reverse"])
def test_a_shared_file_is_refused_and_its_unrolled_one_runs(tmp_path: Path, order: str) -> None:
    file, _ = exported(tmp_path, "F32", shared(order, 2, max_position_embeddings=256))
    with pytest.raises(ValueError, match="Failed to load model"), opened(file):
        pass
    with pytest.raises(WorkerError, match="llama.cpp refuses"):
        Worker("llama.cpp", file, 1, 40)
    plain = tmp_path / "plain.gguf"
    write_unrolled(file, plain)
    ours = our_logits(file)
    with opened(plain) as theirs:
        assert apart(logits(theirs, TOKENS), ours) < TOLERANCE["F32"]


def test_its_tokenizer_gives_our_ids(tmp_path: Path, small_text: Path) -> None:
    text = small_text.read_text(encoding="utf-8")
    pieces = [text[start : start + 997] for start in range(0, len(text), 997)]
    strange = [
        "",
        " ",
        "  two",
        "tab\tand\nline\n",
        "日本 é 🙂 \u00a0",
        "<s> </s> <unk>",
        "a" * 300,
        "\n\n\n x",
    ]
    tokenizer = Tokenizer.train(pieces, 2048)
    file = tmp_path / "m.gguf"
    write_with(tokenizer, replace(SHAPE, vocab_size=2050), file)
    with opened(file) as theirs:
        for piece in [*pieces, *strange]:
            assert encode(theirs, piece) == tokenizer.encode(piece), piece


def test_the_shared_tokenizer_too(tmp_path: Path, shared: Path) -> None:
    tokenizer = Tokenizer.from_sentencepiece(shared / "tokenizer" / "llama_sp_32k.tokenizer.model")
    text = (shared / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    file = tmp_path / "m.gguf"
    write_with(tokenizer, replace(SHAPE, vocab_size=32_000, num_layers=1), file)
    with opened(file) as theirs:
        for line in text.splitlines(keepends=True)[:400]:
            assert encode(theirs, line) == tokenizer.encode(line), line


def write_with(tokenizer: Tokenizer, config: ModelConfig, file: Path) -> None:
    roles = Roles(TYPES["Q8_0"], TYPES["Q8_0"])
    write_model(file, config, random_weights(config), tokenizer, roles, "m")


def test_it_takes_part_in_a_benchmark(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "Q8_0", LONG)
    with Worker("llama.cpp", file, 1, 200) as worker:
        assert worker.about["version"] == llama_cpp.__version__
        for depth in (0, 150, 150, 20):
            assert worker.call("decode", depth=depth, tokens=10) > 0
        assert worker.call("prefill", tokens=200) > 0
    (start,), failures = cold_starts([Entry(PROMPT, "llama.cpp", file)], 200, 1, 1, lambda *turn: None)
    assert not failures
    assert start.seconds[0][3] > start.seconds[0][2] > start.load_seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_125m(tmp_path: Path, kind: str) -> None:
    from mobilellm.runtime.random_model import write_random_model

    file = tmp_path / "m.gguf"
    write_random_model(file, "125m", kind)
    ours = our_logits(file)
    with opened(file) as theirs:
        assert apart(logits(theirs, TOKENS), ours) < TOLERANCE[kind]
        if kind == "F32":
            assert_greedy_text_is_the_same(file, theirs, [1, *range(300, 310)], 60)
