"""Checkpoints: every official layout loads with exactly its tensors, in the dtype that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import official
import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import equal, quietly, refused
from official import EMBEDDING, HEAD
from random_models import (
    TINY,
    assert_near,
    random_model,
    some_tokens,
    stock_twin,
)
from torch import Tensor

import mobilellm
from mobilellm.config import ModelConfig
from mobilellm.model.checkpoint import CheckpointError, read_weights, save
from mobilellm.model.tensor_files import TensorsInFile
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer
from tokenizer_oracles import small, small_model, trained

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


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


def test_loading_keeps_the_tokenizer_that_fits(tmp_path: Path) -> None:
    save(tmp_path / "out", random_model(replace(TINY, vocab_size=768)), trained())
    loaded = quietly(tmp_path / "out")
    assert isinstance(loaded.tokenizer, Tokenizer)
    assert loaded.source == str(tmp_path / "out")
