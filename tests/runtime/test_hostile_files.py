"""No file makes the reader or the engine crash, hang, take memory without bound, or say more than one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import SHAPE, exported
from hostile_files import NUMBERS, VALUES, Parts, hostile, use
from hypothesis import given, settings
from hypothesis import strategies as st

import mobilellm.runtime
from mobilellm import gguf_model
from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import TYPES
from mobilellm.runtime import engine

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)

SMALL = replace(
    SHAPE, vocab_size=300, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
    max_position_embeddings=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A valid file of every type, and one of a shared model."""
    folder = tmp_path_factory.mktemp("valid")
    shared = replace(SMALL, repeats=2, order="reverse")
    return [
        *(exported(folder / kind, kind, SMALL)[0] for kind in TYPES),
        exported(folder / "shared", "Q8_0", shared)[0],
    ]


def use_many(first: int, count: int, folder: Path, files: list[Path]) -> int:
    """How many of these hostile files were accepted; in a process of its own, which has little memory."""
    command = [sys.executable, str(Path(__file__).with_name("hostile_files.py")), str(first), str(count)]
    done = subprocess.run(
        [*command, str(folder), *map(str, files)], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return int(done.stdout.split()[2])


def test_hostile_files_are_refused_or_run(tmp_path: Path, files: list[Path]) -> None:
    assert 20 < use_many(0, 400, tmp_path, files) < 150


@pytest.mark.slow
def test_very_many_hostile_files_are_refused_or_run(tmp_path: Path, files: list[Path]) -> None:
    assert 1_500 < use_many(1_000, 20_000, tmp_path, files) < 6_000


_ANYTHING = st.one_of(
    st.sampled_from(VALUES),
    st.integers(-(2**31), 2**64 - 1),
    st.floats(width=32),
    st.booleans(),
    st.text(st.characters(codec="utf-8"), max_size=100),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=9),
    st.lists(st.integers(0, 255), max_size=9).map(lambda numbers: np.array(numbers, np.uint8)),
)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_header_is_refused_or_run(
    files: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any values for the keys that are known and for others, and any descriptions of tensors."""
    parts = Parts.of(data.draw(st.sampled_from(files)))
    keys = st.one_of(
        st.sampled_from(sorted(parts.metadata)), st.text(st.characters(codec="utf-8"), max_size=70)
    )
    metadata: dict[str, Any] = {**parts.metadata, **data.draw(st.dictionaries(keys, _ANYTHING, max_size=4))}
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), max_size=2, unique=True)):
        del metadata[key]
    tensors = list(parts.tensors)
    sizes = st.one_of(st.sampled_from(NUMBERS), st.integers(0, 400))
    for at in data.draw(st.lists(st.integers(0, len(tensors) - 1), max_size=2)):
        name, its_sizes, kind, offset = tensors[at]
        tensors[at] = (
            data.draw(st.one_of(st.just(name), st.text(st.characters(codec="utf-8"), max_size=70))),
            data.draw(st.one_of(st.just(its_sizes), st.lists(sizes, max_size=5).map(tuple))),
            data.draw(st.one_of(st.just(kind), st.integers(0, 40))),
            data.draw(st.one_of(st.just(offset), sizes)),
        )
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(Parts(metadata, tensors, parts.data).together())
    use(path)


def test_a_file_taken_apart_and_put_together_is_the_same(files: list[Path], tmp_path: Path) -> None:
    """Else nothing above would be about valid files with one thing changed."""
    path = tmp_path / "same.gguf"
    path.write_bytes(Parts.of(files[3]).together())
    assert use(path)
    assert str(Parts.of(path).metadata) == str(Parts.of(files[3]).metadata)
    assert len({hostile(Parts.of(files[3]), case) for case in range(50)}) == 50


def changed(files: list[Path], tmp_path: Path, **values: Any) -> Path:
    """The Q8_0 file with other values for these keys."""
    parts = Parts.of(files[3])
    path = tmp_path / "changed.gguf"
    path.write_bytes(replace(parts, metadata={**parts.metadata, **values}).together())
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "gpt2"}, "its architecture is 'gpt2'; llama and mobilellm are run here"),
        ({"general.architecture": np.arange(5000)}, "its architecture is an array of 5,000; llama and"),
        ({"tokenizer.ggml.model": "gpt2"}, r"its tokenizer is 'gpt2'; only 'llama' \(SentencePiece BPE\)"),
        ({"llama.attention.head_count": "two"}, "num_heads = 'two' must be of type int"),
        ({"llama.attention.head_count": 0}, "num_heads = 0 must be at least 1"),
        ({"llama.embedding_length": np.arange(9)}, "no single value 'llama.embedding_length'"),
        (
            {"llama.context_length": 2**32 - 1},
            "max_position_embeddings = 4294967295 is more than 1,073,741,824",
        ),
        ({"llama.rope.scaling.type": "yarn"}, "'llama.rope.scaling.type' = 'yarn' is not implemented"),
        ({"llama.block_count": 5000}, "says it has 5000 blocks"),
        ({"tokenizer.ggml.tokens": []}, "tokens and scores are missing or not equally many"),
    ],
)
def test_what_a_header_says_wrong_is_named(
    files: list[Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"changed\.gguf: .*{message}"):
        mobilellm.runtime.load(changed(files, tmp_path, **values), 1)


def test_a_shared_model_that_would_run_for_ever_is_refused(files: list[Path], tmp_path: Path) -> None:
    parts = Parts.of(files[-1])
    path = tmp_path / "long.gguf"
    metadata = {**parts.metadata, "mobilellm.layer_sharing.repeats": 2**32 - 1}
    path.write_bytes(replace(parts, metadata=metadata).together())
    with pytest.raises(ValueError, match=r"num_steps = 8589934590 is more than 65,536"):
        gguf_model.read_config(read_gguf(path))


def test_a_vocabulary_larger_than_the_embedding_is_refused(files: list[Path], tmp_path: Path) -> None:
    tokens = Parts.of(files[3]).metadata["tokenizer.ggml.tokens"]
    more = [*tokens, "one", "two"]
    values = {"tokenizer.ggml.tokens": more, "tokenizer.ggml.scores": np.zeros(len(more), np.float32)}
    with pytest.raises(ValueError, match="its tokenizer has 302 pieces and its embedding 300 rows"):
        mobilellm.runtime.load(changed(files, tmp_path, **values), 1)


def test_a_type_that_is_not_known_is_named(files: list[Path], tmp_path: Path) -> None:
    parts = Parts.of(files[3])
    tensors = [(name, sizes, 12, offset) for name, sizes, _, offset in parts.tensors]  # Q4_K
    path = tmp_path / "other.gguf"
    path.write_bytes(replace(parts, tensors=tensors).together())
    with pytest.raises(
        ValueError, match=r"'token_embd.weight' has type 12, which is not read; known are F32,"
    ):
        mobilellm.runtime.load(path, 1)


def test_a_download_that_broke_off_is_told(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(files[3].read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"half\.gguf: is cut off or damaged: .*; fetch it again"):
        mobilellm.runtime.load(path, 1)
