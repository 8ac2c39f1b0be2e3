"""Checkpoints: every official layout loads with exactly its tensors; everything else is refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import official
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official import EMBEDDING, HEAD
from random_models import (
    SHARED,
    TINY,
    assert_near,
    random_model,
    shared_model,
    some_tokens,
    stock_llama,
    stock_twin,
)
from torch import Tensor

import mobilellm
from mobilellm import hub
from mobilellm.config import ConfigError, ModelConfig
from mobilellm.model.api import LoadedModel
from mobilellm.model.checkpoint import CheckpointError, Weights, build, read_weights, save, unroll
from mobilellm.model.tensor_files import TensorsInFile
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import Tokenizer
from tokenizer_oracles import small, small_model, trained

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def equal(ours: Mapping[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """The same names, dtypes, shapes and bits."""
    return ours.keys() == wanted.keys() and all(
        tensor.dtype == wanted[name].dtype
        and tensor.shape == wanted[name].shape
        and torch.equal(tensor.contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8))
        for name, tensor in ours.items()
    )


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def quietly(source: Path, **options: Any) -> LoadedModel:
    return mobilellm.load(source, say=lambda line: None, **options)


def refused(directory: Path, kind: type[Exception] = CheckpointError) -> str:
    """The one line with which reading and loading are refused; it names the directory and nothing internal."""
    with pytest.raises(kind) as caught:
        read_weights(directory)
    message = str(caught.value)
    with pytest.raises(kind) as loading:
        quietly(directory)
    assert str(loading.value) == message
    assert "\n" not in message
    assert str(directory) in message
    return message


# Every official layout

LAYOUTS: dict[Callable[[Path], dict[str, Tensor]], tuple[str, ...]] = {  # and what is said of the weights
    official.mobilellm_125m: (),
    official.bot_safetensors: (f"{EMBEDDING} was missing and its tensor stored as {HEAD}",),
    official.mobilellm_1b: (f"{HEAD} is stored and differs",),
    official.mobilellm_1_5b: (),
    official.layer_share: (),
}


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_official_layouts(tmp_path: Path, write: Callable[[Path], dict[str, Tensor]]) -> None:
    tensors = write(tmp_path)
    official.write_tokenizer(tmp_path, small_model())
    llama = write is official.mobilellm_1_5b
    shared = write is official.layer_share

    weights = read_weights(tmp_path)
    assert equal(weights.tensors, tensors)
    on_demand = read_weights(tmp_path, on_demand=True)
    assert equal(on_demand.tensors, tensors)
    assert on_demand.repairs == weights.repairs
    assert weights.model_type == ("llama" if llama else "mobilellm")
    assert weights.config.tie_word_embeddings == (not llama)
    assert weights.config.schedule == ((0, 0, 1, 1, 2, 2) if shared else (0, 1, 2))

    said: list[str] = []
    loaded = mobilellm.load(tmp_path, say=said.append)
    expected = LAYOUTS[write]
    config_repair = () if llama else ("share_embedding = true",)  # beside tie_word_embeddings = false
    wanted = (*config_repair, *expected, "tokenizer_config.json has empty special tokens")
    assert len(loaded.repairs) == len(said) == len(wanted)
    for repair, line, part in zip(loaded.repairs, said, wanted, strict=True):
        assert part in repair
        assert line == f"{tmp_path}: repaired: {repair}"
        assert "\n" not in line

    stored = torch.bfloat16 if write in (official.mobilellm_1b, official.mobilellm_1_5b) else torch.float16
    dtype = torch.float32 if stored == torch.float16 else stored
    state = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert equal(dict(loaded.model.state_dict()), state)
    assert not loaded.model.training
    tokens = some_tokens(official.VOCAB, 2, 12)
    config = replace(weights.config, repeats=1, num_layers=3)
    oracle = stock_twin(MobileLLMHolding(config, state), weights.config.schedule)
    with torch.inference_mode():
        model = quietly(tmp_path, dtype="float32").model
        assert_near(model(tokens), oracle(tokens).logits)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("</s> text") == small().encode("</s> text")
    assert mobilellm.generate(loaded, "text", max_new_tokens=3)[0].tokens


def MobileLLMHolding(config: ModelConfig, state: dict[str, Tensor]) -> MobileLLM:  # noqa: N802
    """A model filled by plain assignment, without any code of the checkpoint room."""
    model = MobileLLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_shards(tmp_path: Path, safe: bool, count: int) -> None:
    tensors = official.random_tensors()
    official.write_config(tmp_path, official.CONFIG)
    official.write_shards(tmp_path, tensors, count, safe)
    for on_demand in (False, True):
        assert equal(read_weights(tmp_path, on_demand).tensors, tensors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_weights_read_on_demand_do_not_stay_in_memory(tmp_path: Path) -> None:
    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) * 1024

    size = 2**22
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({str(n): torch.full((size,), n, dtype=torch.int8) for n in range(8)}, file)
    before = held()
    tensors = TensorsInFile(file)
    for name, tensor in tensors.items():
        assert int(tensor.max()) == int(name)
    assert held() - before < 2 * size
    with pytest.raises(KeyError):
        tensors["8"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        tensors["0"]


def test_shards_of_the_bot_are_repaired_too(tmp_path: Path) -> None:
    tensors = official.random_tensors()
    official.write_config(tmp_path, official.CONFIG)
    official.write_shards(
        tmp_path, {HEAD if name == EMBEDDING else name: t for name, t in tensors.items()}, 2, safe=True
    )
    weights = read_weights(tmp_path)
    assert equal(weights.tensors, tensors)
    assert len(weights.repairs) == 2


def test_old_pickles(tmp_path: Path) -> None:
    tensors = official.random_tensors()
    official.write_config(tmp_path, official.CONFIG)
    official.write_bin(tmp_path, tensors, legacy=True)
    assert equal(read_weights(tmp_path).tensors, tensors)


def test_parameters_and_shared_storage_in_a_pickle(tmp_path: Path) -> None:
    """A pickled state dict may hold Parameters, transposed views, and one tensor under two names."""
    tensors = official.random_tensors(torch.float32)
    official.write_config(tmp_path, official.CONFIG)
    held: dict[str, Tensor] = {
        name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    }
    held[Q_PROJ] = tensors[Q_PROJ].t().contiguous().t()
    held[HEAD] = held[EMBEDDING]
    official.write_bin(tmp_path, held)
    loaded = quietly(tmp_path)
    assert any("stored a second time" in repair for repair in loaded.repairs)
    assert equal(dict(loaded.model.state_dict()), tensors)
    for parameter in loaded.model.parameters():
        assert parameter.requires_grad
        assert parameter.is_contiguous()


def test_an_untied_model_never_shares_its_head(tmp_path: Path) -> None:
    """One tensor under two names is two weights where the config says so: training one must not move both."""
    tensors = official.random_tensors(torch.float32)
    official.write_config(tmp_path, official.LLAMA)
    official.write_bin(tmp_path, tensors | {HEAD: tensors[EMBEDDING]})
    model = quietly(tmp_path).model
    assert torch.equal(model.head_weight, model.model.embed_tokens.weight)
    assert model.head_weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    save(tmp_path / "saved", model, None)
    assert equal(read_weights(tmp_path / "saved").tensors, dict(model.state_dict()))


def test_stored_rotary_tables_are_checked_and_dropped(tmp_path: Path) -> None:
    tensors = official.random_tensors()
    official.write_config(tmp_path, official.CONFIG)
    table = 1 / 10000 ** (torch.arange(0, 4, 2) / 4)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        official.write_bin(tmp_path, tensors | {name: table.to(dtype) for name in names})
        weights = read_weights(tmp_path)
        assert equal(weights.tensors, tensors)
        assert weights.repairs[-1] == "3 stored rotary tables dropped (they follow from rope_theta)"
    for wrong in (1 / 5e5 ** (torch.arange(0, 4, 2) / 4), table[:1], table * torch.nan):
        official.write_bin(tmp_path, tensors | {names[1]: wrong})
        assert f"{names[1]} is not the rotary table of head_dim = 4 and rope_theta = 10000.0" in refused(
            tmp_path
        )


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    official.write_config(tmp_path, official.CONFIG)
    first = official.random_tensors(seed=1)
    official.write_safetensors(tmp_path, first)
    official.write_bin(tmp_path, official.random_tensors(seed=2))
    assert equal(read_weights(tmp_path).tensors, first)


def test_a_training_run_stands_for_its_model(tmp_path: Path) -> None:
    official.mobilellm_125m(tmp_path / "run" / "model")
    assert quietly(tmp_path / "run").model.config.num_layers == 3


def test_links_lead_to_files_elsewhere(tmp_path: Path) -> None:
    """As in the cache of huggingface_hub."""
    tensors = official.mobilellm_125m(tmp_path / "files")
    (tmp_path / "links").mkdir()
    for number, file in enumerate(sorted((tmp_path / "files").iterdir())):
        (tmp_path / "links" / file.name).symlink_to(f"../files/{number}")
        file.rename(file.with_name(str(number)))
    assert equal(read_weights(tmp_path / "links").tensors, tensors)


def test_a_gguf_file_is_known_by_the_end_of_its_name(tmp_path: Path) -> None:
    for name, said in (("m.gguf", "is a .gguf file, which is there to be run"), ("m.GGUF", "rename it")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(FileNotFoundError, match=said):
            hub.resolve(tmp_path / name, print)


# dtypes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_dtypes(tmp_path: Path, stored: torch.dtype, asked: str | None) -> None:
    tensors = official.random_tensors(stored)
    official.write_config(tmp_path, official.CONFIG)
    official.write_safetensors(tmp_path, tensors)
    model = quietly(tmp_path, dtype=asked).model
    kept = torch.float32 if stored == torch.float16 else stored
    wanted = getattr(torch, asked) if asked else kept
    assert equal(dict(model.state_dict()), {name: tensor.to(wanted) for name, tensor in tensors.items()})


def test_mixed_dtypes_lose_nothing(tmp_path: Path) -> None:
    tensors = official.random_tensors(torch.float32)
    mixed = {name: t if t.ndim == 1 else t.to(torch.bfloat16) for name, t in tensors.items()}
    official.write_config(tmp_path, official.CONFIG)
    official.write_safetensors(tmp_path, mixed)
    model = quietly(tmp_path).model
    assert equal(dict(model.state_dict()), {name: tensor.float() for name, tensor in mixed.items()})


def test_values_too_large_for_the_dtype_asked_for(tmp_path: Path) -> None:
    tensors = official.random_tensors(torch.bfloat16)
    tensors[Q_PROJ][0, 0] = 1e5
    official.write_config(tmp_path, official.CONFIG)
    official.write_safetensors(tmp_path, tensors)
    assert quietly(tmp_path).model.state_dict()[Q_PROJ][0, 0] > 9e4
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has values too large for torch\.float16"):
        quietly(tmp_path, dtype="float16")


def test_dtypes_and_devices_that_do_not_exist(tmp_path: Path) -> None:
    official.mobilellm_125m(tmp_path)
    with pytest.raises(
        ValueError, match="dtype = 'int8' is not known; choose one of float32, bfloat16, float16"
    ):
        quietly(tmp_path, dtype="int8")
    for device in ("abacus", "cuda:99", "meta:x"):
        with pytest.raises(ValueError, match=f"device = '{device}' cannot be used") as caught:
            quietly(tmp_path, device=device)
        assert "\n" not in str(caught.value)


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


# Saving


def stored_names(directory: Path) -> list[str]:
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["llama", "mobilellm"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_saving_and_loading_changes_no_bit(
    tmp_path: Path, tied: bool, dtype: torch.dtype, layout: str, repeats: int
) -> None:
    config = replace(TINY, vocab_size=700, tie_word_embeddings=tied, repeats=repeats)
    model = random_model(config, 0, dtype)
    out = tmp_path / "deep" / "out"
    if layout == "llama" and repeats > 1:
        with pytest.raises(ValueError, match="layout 'llama' cannot share layers"):
            save(out, model, trained(), layout)
        assert not out.parent.exists()
        return
    save(out, model, trained(), layout)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    weights = read_weights(out)
    assert weights.config == config
    assert (weights.model_type, weights.repairs) == (layout, ())
    assert equal(weights.tensors, dict(model.state_dict()))
    assert (HEAD in stored_names(out)) == (not tied)
    loaded = quietly(out, dtype=str(dtype).removeprefix("torch."))
    assert loaded.repairs == ()
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.fingerprint == trained().fingerprint
    tokens = some_tokens(700, 2, 9)
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens), model(tokens))
    save(tmp_path / "again", loaded.model, loaded.tokenizer, layout)
    assert bytes_of(tmp_path / "again") == bytes_of(out)


def test_the_default_layout(tmp_path: Path) -> None:
    for repeats, wanted in ((1, "llama"), (2, "mobilellm")):
        save(tmp_path / wanted, shared_model("immediate", repeats), None)
        assert read_weights(tmp_path / wanted).model_type == wanted
    with pytest.raises(ValueError, match="layout 'gguf' is not known"):
        save(tmp_path / "x", random_model(TINY), None, "gguf")


def test_generation_defaults_pad_with_what_is_not_eos(tmp_path: Path) -> None:
    save(tmp_path / "out", random_model(TINY), None)
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert values == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_weight_is_stored_once_everywhere(tmp_path: Path, tied: bool) -> None:
    model = random_model(replace(TINY, tie_word_embeddings=tied))
    save(tmp_path / "out", model, None)
    loaded = quietly(tmp_path / "out").model
    built = build(Weights(TINY, {k: v for k, v in model.state_dict().items() if k != HEAD}, "llama", ()))
    assert built.head_weight is built.model.embed_tokens.weight
    embedding, head = loaded.model.embed_tokens.weight, loaded.head_weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    assert (head is embedding) == tied
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers * 4 <= size < numbers * 4 + 10_000
    with torch.no_grad():
        embedding[5].fill_(7.0)
    assert (head[5] == 7.0).all() == tied
    save(tmp_path / "changed", loaded, None)
    assert equal(read_weights(tmp_path / "changed").tensors, dict(loaded.state_dict()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_transformers_loads_what_was_saved(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = random_model(replace(TINY, tie_word_embeddings=tied, rope_theta=5e4, rms_norm_eps=1e-3), 0, dtype)
    save(tmp_path / "out", model, None, "llama")
    stock, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert stock.dtype == dtype
    assert stock.generation_config.pad_token_id == 0
    assert stock.generation_config.eos_token_id == 2
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), LlamaForCausalLM)
    tokens = some_tokens(101, 2, 20)
    with torch.inference_mode():
        ours, theirs = model.float()(tokens), stock.float()(tokens).logits
    assert_near(ours, theirs)


def test_what_stock_transformers_saves_loads_here(tmp_path: Path) -> None:
    """Saved by transformers: other files, other spellings, sharded or not."""
    for tied in (True, False):
        config = replace(TINY, tie_word_embeddings=tied, rope_theta=5e4)
        model = random_model(config)
        stock = stock_llama(config, model.state_dict())
        for name, limit in (("whole", "1GB"), ("sharded", "200KB")):
            directory = tmp_path / f"{name}-{tied}"
            stock.save_pretrained(directory, max_shard_size=limit)
            weights = read_weights(directory)
            assert (weights.config, weights.repairs) == (config, ())
            assert equal(weights.tensors, dict(model.state_dict()))
        assert (directory / "model.safetensors.index.json").is_file()


def test_an_unrolled_model_is_a_llama(tmp_path: Path) -> None:
    model = shared_model("reverse", 3)
    save(tmp_path / "out", unroll(model), None, "llama")
    tokens = some_tokens(101, 1, 9)
    with torch.inference_mode():
        assert_near(quietly(tmp_path / "out").model(tokens), model(tokens))


def test_every_schedule_survives_saving(tmp_path: Path) -> None:
    tokens = some_tokens(101, 1, 9)
    for order, repeats in SHARED:
        model = shared_model(order, repeats)
        directory = tmp_path / f"{order}-{repeats}"
        save(directory, model, None, "mobilellm")
        loaded = quietly(directory).model
        assert loaded.config == model.config
        assert len(stored_names(directory)) == 3 * 9 + 2
        with torch.inference_mode():
            assert torch.equal(loaded(tokens), model(tokens))


def test_a_loaded_model_outlives_its_files(tmp_path: Path) -> None:
    """The weights may be a mapping of the file: replacing or deleting it must not change them."""
    official.mobilellm_1_5b(tmp_path / "bin")
    save(tmp_path / "safe", random_model(TINY), None)
    for directory in (tmp_path / "bin", tmp_path / "safe"):
        model = quietly(directory).model
        tokens = some_tokens(101, 1, 9)
        with torch.inference_mode():
            before = model(tokens)
            save(directory, random_model(TINY, 9), None, overwrite=True)
            assert torch.equal(model(tokens), before)
            shutil.rmtree(directory)
            assert torch.equal(model(tokens), before)


def test_training_a_loaded_model_leaves_its_files_alone(tmp_path: Path) -> None:
    official.mobilellm_1_5b(tmp_path / "bin")
    save(tmp_path / "safe", random_model(TINY), None)
    for directory in (tmp_path / "bin", tmp_path / "safe"):
        before = bytes_of(directory)
        model = quietly(directory).model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(some_tokens(101, 1, 9)).square().mean().backward()
        optimizer.step()
        assert bytes_of(directory) == before


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "out", random_model(TINY, 1), None)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save(tmp_path / "out", random_model(TINY, 2), None)
    assert bytes_of(tmp_path / "out") == before
    save(tmp_path / "out", random_model(TINY, 2), None, overwrite=True)
    assert equal(read_weights(tmp_path / "out").tensors, dict(random_model(TINY, 2).state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_of_other_things_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(
        FileExistsError, match=r"holds other things than a model \(there is no config\.json\)"
    ):
        save(tmp_path, random_model(TINY), None, overwrite=True)
    assert bytes_of(tmp_path) == {"thesis.txt": b"years of work"}


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    save(tmp_path / "out", random_model(TINY, 1), None)
    before = bytes_of(tmp_path / "out")
    broken = random_model(TINY)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    adapted = random_model(TINY)
    adapted.model.layers[0].extra = torch.nn.Linear(2, 2)
    for model, says in (
        (broken, "model.norm.weight holds NaN or infinity"),
        (random_model(TINY).double(), "has dtype torch.float64"),
        (adapted, "unknown tensors model.layers.0.extra.bias, model.layers.0.extra.weight"),
    ):
        with pytest.raises(CheckpointError, match="out: not saved, for it could not be loaded: ") as caught:
            save(tmp_path / "out", model, None, overwrite=True)
        assert says in str(caught.value)
    assert bytes_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_may_not_grow_leaves_the_old_directory(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every write beyond a limit fail, as a full disk does, whoever runs the test."""
    model = MobileLLM(preset("tiny"), torch.Generator().manual_seed(1))
    save(tmp_path / "out", random_model(TINY, 1), None)
    before = bytes_of(tmp_path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # nothing, config.json cut, the weights cut early, and late
        for limit in (0, 100, 3000, 4_000_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError, match="File too large") as caught:
                save(tmp_path / "out", model, trained(), overwrite=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "out"))
            assert ".tmp-" not in str(caught.value)
            assert bytes_of(tmp_path) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk(where: Path) -> Iterator[None]:
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize("fits", ["nothing", "config", "half the weights", "the weights"])
def test_a_full_disk_leaves_the_old_directory(tmp_path: Path, fits: str) -> None:
    config = replace(TINY, vocab_size=700)
    save(tmp_path / "sizes", random_model(config), trained())
    weights = (tmp_path / "sizes" / "model.safetensors").stat().st_size
    free = {
        "nothing": 0,
        "config": 3 * 4096,
        "half the weights": weights // 2,
        "the weights": weights + 5 * 4096,
    }
    with small_disk(tmp_path / "disk"):
        out = tmp_path / "disk" / "out"
        save(out, random_model(config, 1), None)
        left = shutil.disk_usage(tmp_path / "disk").free
        (tmp_path / "disk" / "ballast").write_bytes(bytes(left - free[fits]))
        before = bytes_of(tmp_path / "disk")
        with pytest.raises(
            OSError, match=r"^\[Errno 28\] .*No space left on device: '.*/disk/out'$"
        ) as caught:
            save(out, random_model(config, 2), trained(), overwrite=True)
        assert caught.value.filename == str(out)
        assert bytes_of(tmp_path / "disk") == before
        assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["ballast", "out"]
        assert equal(read_weights(out).tensors, dict(random_model(config, 1).state_dict()))


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


def test_loading_keeps_the_tokenizer_that_fits(tmp_path: Path) -> None:
    save(tmp_path / "out", random_model(replace(TINY, vocab_size=768)), trained())
    loaded = quietly(tmp_path / "out")
    assert isinstance(loaded.tokenizer, Tokenizer)
    assert loaded.source == str(tmp_path / "out")
