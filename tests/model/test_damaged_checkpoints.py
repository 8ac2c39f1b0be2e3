"""Checkpoints that are not whole, not ours, or not safe to open: each is refused in one line that names it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import official
import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import equal, quietly, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official import EMBEDDING, HEAD
from random_models import (
    TINY,
    random_model,
)
from torch import Tensor

from mobilellm.config import ConfigError
from mobilellm.model.checkpoint import CheckpointError, read_weights, save
from tokenizer_oracles import trained

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


# Refusals: files


def cuts(size: int) -> list[int]:
    """Where to cut a file: nothing, inside the head, in the middle, near and one before the end."""
    return sorted(
        {0, 1, 4, 8, 9, 100, size // 10, size // 2, size * 9 // 10, size - 300, size - 22, size - 1}
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.filterwarnings("error")
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    official.write_config(tmp_path, official.CONFIG)
    tensors = official.random_tensors()
    if kind == "safetensors":
        file = official.write_safetensors(tmp_path, tensors)
    else:
        file = official.write_bin(tmp_path, tensors, legacy=kind == "old bin")
    whole = file.read_bytes()
    for cut in cuts(len(whole)):
        file.write_bytes(whole[:cut])
        message = refused(tmp_path)
        assert message.startswith(f"{file}: ")
        assert message.endswith("; fetch it again")
        assert "code" not in message
    file.write_bytes(whole)
    assert equal(read_weights(tmp_path).tensors, tensors)


@pytest.mark.filterwarnings("error")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_in_the_head_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Damage outside the tensors' bytes is refused in one line or harmless, in every kind of file."""
    official.write_config(tmp_path, official.CONFIG)
    kind = data.draw(st.sampled_from(["safetensors", "bin", "old bin"]))
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).unlink(missing_ok=True)
    tensors = official.random_tensors()
    if kind == "safetensors":
        file = official.write_safetensors(tmp_path, tensors)
    else:
        file = official.write_bin(tmp_path, tensors, legacy=kind == "old bin")
    damaged = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 3000))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(damaged)
    try:
        assert read_weights(tmp_path).tensors.keys() == tensors.keys()
    except CheckpointError:
        assert refused(tmp_path).startswith(str(file))


class Bomb:
    """Unpickled without care, it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, legacy: bool, sharded: bool) -> None:
    trace = tmp_path / "it-ran"
    directory = tmp_path / "model"
    official.write_config(directory, official.CONFIG)
    tensors: dict[str, Any] = {**official.random_tensors(), "bomb": Bomb(trace)}
    file = official.write_bin(directory, tensors, legacy)
    pickle.loads(pickle.dumps(Bomb(trace)))  # it does explode where nobody takes care
    assert trace.exists()
    trace.unlink()
    if sharded:
        official.write_shards(directory, official.random_tensors(), 2, safe=False)
        file = file.rename(directory / "pytorch_model-00002-of-00002.bin")
    message = refused(directory)
    assert message.startswith(f"{file}: the pickle wants ")
    assert "posix.system" in message
    assert "refused, nothing was run" in message
    assert not trace.exists()


def test_a_plain_pickle_with_code_does_not_run(tmp_path: Path) -> None:
    official.write_config(tmp_path, official.CONFIG)
    trace = tmp_path / "it-ran"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({EMBEDDING: Bomb(trace)}))
    refused(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "expected a state dict of tensors, got list"),
        ({"model": {EMBEDDING: torch.zeros(2)}, "step": 3}, "but 'model' is dict"),
        ({0: torch.zeros(2)}, "but 0 is Tensor"),
        (torch.zeros(2), "expected a state dict of tensors, got Tensor"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, content: Any, says: str) -> None:
    official.write_config(tmp_path, official.CONFIG)
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert says in refused(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert "no config.json there" in refused(tmp_path, FileNotFoundError)
    official.write_config(tmp_path, official.CONFIG)
    assert "no weights there; expected model.safetensors or pytorch_model.bin" in refused(
        tmp_path, FileNotFoundError
    )
    (tmp_path / "config.json").unlink()
    official.write_safetensors(tmp_path, official.random_tensors())
    assert "no config.json there" in refused(tmp_path, FileNotFoundError)


# Refusals: shards


def broken_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> str:
    official.write_config(directory, official.CONFIG)
    official.write_shards(directory, official.random_tensors(), 2, safe=True)
    file = directory / "model.safetensors.index.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    changed = change(content["weight_map"])
    if changed is not None:
        content = changed
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "./x"]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    index = broken_index(directory, lambda weight_map: weight_map.update({EMBEDDING: name}))
    (tmp_path / "outside.safetensors").write_bytes(
        (directory / "model-00001-of-00002.safetensors").read_bytes()
    )
    (directory / "sub").mkdir()
    official.write_safetensors(directory / "sub", official.random_tensors())
    assert refused(directory) == f"{index}: shard {name!r} lies outside the directory; refused"


@pytest.mark.parametrize(
    "content", [{}, [], {"weight_map": None}, {"weight_map": {"a": 3}}, {"weight_map": {"a": []}}]
)
def test_what_is_no_index(tmp_path: Path, content: Any) -> None:
    index = broken_index(tmp_path, lambda weight_map: content)
    assert refused(tmp_path) == f"{index}: not a weight index; fetch it again"


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    index = broken_index(tmp_path, lambda weight_map: None)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert refused(tmp_path).startswith(f"{shard}: not a whole safetensors file")
    shard.unlink()
    assert f"{shard}: named by {Path(index).name} and missing; fetch it again" in refused(
        tmp_path, FileNotFoundError
    )
    Path(index).write_text(Path(index).read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert refused(tmp_path) == f"{index}: not a weight index; fetch it again"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    broken_index(tmp_path, lambda weight_map: None)
    second = tmp_path / "model-00002-of-00002.safetensors"
    held = safetensors.torch.load_file(second) | {EMBEDDING: official.random_tensors(seed=3)[EMBEDDING]}
    safetensors.torch.save_file(held, second)
    assert f"{second}: holds {EMBEDDING}, as another shard does" in refused(tmp_path)


def test_an_index_that_leaves_a_shard_out(tmp_path: Path) -> None:
    index = broken_index(
        tmp_path,
        lambda weight_map: {"weight_map": {n: f for n, f in weight_map.items() if "00001" in f}},
    )
    assert f"{index}: missing tensors " in refused(tmp_path)


# Refusals: tensors


def faulty(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = official.random_tensors()
    change(tensors)
    return tensors


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(Q_PROJ), (f"missing tensors {Q_PROJ}",)),
    "norm missing": (lambda t: t.pop("model.norm.weight"), ("missing tensors model.norm.weight",)),
    "embedding missing": (lambda t: t.pop(EMBEDDING), (f"missing tensors {EMBEDDING}",)),
    "extra": (lambda t: t.update({"model.layers.3.x": torch.ones(1)}), ("unknown tensors model.layers.3.x",)),
    "renamed": (
        lambda t: t.update({"transformer.q": t.pop(Q_PROJ)}),
        (f"missing tensors {Q_PROJ}", "unknown tensors transformer.q"),
    ),
    "transposed": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING].t().contiguous()}),
        (f"{EMBEDDING} has shape (36, 600) where config.json gives (600, 36)",),
    ),
    "flat": (lambda t: t.update({Q_PROJ: t[Q_PROJ].flatten()}), (f"{Q_PROJ} has shape (1296,)",)),
    "scalar": (lambda t: t.update({Q_PROJ: torch.tensor(0.5)}), (f"{Q_PROJ} has shape ()",)),
    "one NaN": (lambda t: t[Q_PROJ][3, 3].fill_(torch.nan), (f"{Q_PROJ} holds NaN or infinity",)),
    "all NaN": (lambda t: t[EMBEDDING].fill_(torch.nan), (f"{EMBEDDING} holds NaN or infinity",)),
    "infinity": (lambda t: t[Q_PROJ][0, 0].fill_(torch.inf), (f"{Q_PROJ} holds NaN or infinity",)),
    "both infinities": (
        lambda t: t[Q_PROJ][0, :2].copy_(torch.tensor([torch.inf, -torch.inf])),
        (f"{Q_PROJ} holds NaN or infinity",),
    ),
    "integers": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)}),
        (f"{Q_PROJ} has dtype torch.int8; only float32, bfloat16, float16 are weights",),
    ),
    "booleans": (lambda t: t.update({Q_PROJ: t[Q_PROJ] > 0}), (f"{Q_PROJ} has dtype torch.bool",)),
    "doubles": (lambda t: t.update({Q_PROJ: t[Q_PROJ].double()}), (f"{Q_PROJ} has dtype torch.float64",)),
    "eight bits": (
        lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)}),
        (f"{Q_PROJ} has dtype torch.float8_e4m3fn",),
    ),
    "several": (
        lambda t: (t.pop("model.norm.weight"), t.update(x=torch.ones(1)), t[Q_PROJ].fill_(torch.nan)),
        ("missing tensors model.norm.weight", "unknown tensors x", f"{Q_PROJ} holds NaN"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_faulty_tensors(tmp_path: Path, fault: str, safe: bool) -> None:
    change, says = FAULTS[fault]
    official.write_config(tmp_path, official.CONFIG)
    file = (official.write_safetensors if safe else official.write_bin)(tmp_path, faulty(change))
    message = refused(tmp_path)
    assert message.startswith(f"{file}: ")
    for part in says:
        assert part in message
    assert message.endswith("weights and config.json must be of one model, fetch both again")


def test_tensors_without_values(tmp_path: Path) -> None:
    official.write_config(tmp_path, official.CONFIG)
    for empty in (torch.empty(36, 36, device="meta", dtype=torch.float16), torch.zeros(36, 36).to_sparse()):
        official.write_bin(tmp_path, official.random_tensors() | {Q_PROJ: empty})
        assert Q_PROJ in refused(tmp_path)


def test_another_shape_than_the_config_says_is_listed_and_cut_short(tmp_path: Path) -> None:
    official.write_config(tmp_path, official.CONFIG | {"num_hidden_layers": 9, "intermediate_size": 81})
    official.write_bin(tmp_path, official.random_tensors())
    message = refused(tmp_path)
    assert "missing tensors model.layers.3.input_layernorm.weight" in message
    assert "and 46 more" in message
    assert "has shape (80, 36) where config.json gives (81, 36)" in message


def test_sums_may_overflow_where_values_do_not(tmp_path: Path) -> None:
    tensors = official.random_tensors(torch.float32)
    tensors[Q_PROJ].fill_(3e38)
    official.write_config(tmp_path, official.CONFIG)
    official.write_safetensors(tmp_path, tensors)
    assert equal(read_weights(tmp_path).tensors, tensors)


def test_heads_that_are_missing_or_too_many(tmp_path: Path) -> None:
    tensors = official.random_tensors(head=True)
    official.write_config(tmp_path, official.LLAMA | {"tie_word_embeddings": True})
    official.write_safetensors(tmp_path, tensors)
    message = refused(tmp_path)
    assert f"tie_word_embeddings = true but {HEAD} differs from {EMBEDDING}" in message
    official.write_safetensors(tmp_path, tensors | {HEAD: tensors[EMBEDDING].clone()})
    weights = read_weights(tmp_path)
    assert HEAD not in weights.tensors
    assert "stored a second time" in weights.repairs[0]
    official.write_config(tmp_path, official.LLAMA)
    official.write_safetensors(tmp_path, official.random_tensors())
    message = refused(tmp_path)
    assert f"missing tensors {HEAD}" in message
    assert "set tie_word_embeddings to true" in message
    official.write_safetensors(tmp_path, {n: t for n, t in tensors.items() if n != EMBEDDING})
    assert f"missing tensors {EMBEDDING}" in refused(tmp_path)


def test_config_keys_are_all_listed(tmp_path: Path) -> None:
    official.mobilellm_125m(tmp_path)
    values = official.CONFIG | {"qk_norm": True, "num_experts": 4}
    del values["rms_norm_eps"], values["hidden_size"]
    official.write_config(tmp_path, values)
    message = refused(tmp_path, ConfigError)
    for key in ("qk_norm", "num_experts", "rms_norm_eps", "hidden_size"):
        assert repr(key) in message


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    official.mobilellm_125m(tmp_path)
    trained().save(tmp_path)
    with pytest.raises(
        CheckpointError, match="the tokenizer has 700 tokens and the embedding 600 rows"
    ) as caught:
        quietly(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointError, match="700 tokens"):
        save(tmp_path / "out", random_model(replace(TINY, vocab_size=600)), trained())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "tokenizer.model", "tokenizer.json", "shard"]
)
def test_a_git_lfs_pointer_is_told(tmp_path: Path, name: str) -> None:
    """A clone without git-lfs holds text files of three lines instead of the large files."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    save(tmp_path / "m", random_model(replace(TINY, vocab_size=768)), trained())
    if name == "shard":
        name = "model-00001-of-00001.safetensors"
        (tmp_path / "m" / "model.safetensors").unlink()
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    elif name == "pytorch_model.bin":
        (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"{name}: only a Git LFS pointer to the file; run `git lfs pull`"):
        quietly(tmp_path / "m")
