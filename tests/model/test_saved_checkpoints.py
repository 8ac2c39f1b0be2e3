"""Checkpoints that are written: no bit is changed, nothing half-written has the name, others read them."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import official
import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import bytes_of, equal, quietly
from official import HEAD
from random_models import (
    SHARED,
    TINY,
    assert_near,
    random_model,
    shared_model,
    some_tokens,
    stock_llama,
)

from mobilellm.model.checkpoint import CheckpointError, Weights, build, read_weights, save, unroll
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from tokenizer_oracles import trained

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


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
