"""Adapters on our model: what is trained, what merging gives, peft's files both ways, other bases refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="needs the extra finetune")

from adapted_models import adapted_model, base_model, some_tokens  # noqa: E402

import mobilellm  # noqa: E402
from mobilellm.config import ModelConfig  # noqa: E402
from mobilellm.model import checkpoint  # noqa: E402
from mobilellm.model.adapter_files import merge_adapter, save_adapter  # noqa: E402
from mobilellm.model.adapters import fingerprint, merged, narrow  # noqa: E402
from mobilellm.model.tensor_files import read_safetensors  # noqa: E402
from mobilellm.model.transformer import MobileLLM  # noqa: E402
from mobilellm.presets import preset  # noqa: E402
from mobilellm.tokenizer import Tokenizer  # noqa: E402
from mobilellm.train.lora import TARGETS, LoraChoice, adapter_parameters  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True, "rank": 16},
    "dora with dropout": {"dora": True, "dropout": 0.5},
    "two targets": {"targets": ("q_proj", "down_proj")},
}
KIND = pytest.mark.parametrize("kind", KINDS)
CONFIG = pytest.mark.parametrize(
    "config",
    [preset("test-ls"), replace(preset("test"), tie_word_embeddings=False)],
    ids=["shared and tied", "untied"],
)


@CONFIG
@KIND
@torch.no_grad()
def test_merging_computes_what_the_adapters_do(config: ModelConfig, kind: str) -> None:
    model = adapted_model(config, **KINDS[kind]).eval()
    tokens, plain = some_tokens(), merged(model.train())  # as the loop has it between two steps
    model.eval()
    assert not torch.allclose(model(tokens), base_model(config)(tokens), atol=1e-2)
    torch.testing.assert_close(plain(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    tuner = copy.deepcopy(model)
    for name, part in list(tuner.named_modules()):
        if isinstance(part, peft.tuners.lora.Linear):
            part.merge(safe_merge=True)
            tuner.set_submodule(name, part.get_base_layer())
    for name, parameter in tuner.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_follows_from_the_seed() -> None:
    tokens = some_tokens()
    for dora in (False, True):
        model = adapted_model(moved=False, dora=dora)
        torch.testing.assert_close(model(tokens), base_model()(tokens), atol=1e-6, rtol=1e-6)
    state, again, other = (adapted_model(seed=seed).state_dict() for seed in (3, 3, 4))
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(state[name], again[name])
    assert not torch.equal(state[name], other[name])


@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_are_trained_and_as_many_as_counted(dora: bool) -> None:
    config, lora = preset("test-ls"), LoraChoice(rank=5, dora=dora, targets=("k_proj", "o_proj", "gate_proj"))
    model = adapted_model(config, rank=5, dora=dora, targets=lora.targets)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == adapter_parameters(lora, config)


def test_frozen_matrices_are_held_in_half() -> None:
    model = adapted_model(targets=("q_proj",))
    if not narrow(model):
        pytest.skip("no kernels for training on this machine")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    half = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert len(half) == 2 * len(TARGETS)
    assert all("_proj" in name and "lora_" not in name for name in half)
    exact = merged(adapted_model(targets=("q_proj",)))
    rounded = merged(model)
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters())
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(rounded.get_parameter(name), parameter, atol=2e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_what_cannot_be_merged_is_named() -> None:
    model = adapted_model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model, "second")
    model.model.layers[0].self_attn.q_proj.set_adapter(["default", "second"])  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: has an adapter that cannot"):
        merged(model)


# Files


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["question one two three", "answer four five six"] * 4, vocab_size=300)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., tuple[MobileLLM, Path, Path]]:
    """An adapted model, the directory of its base, and that of its adapter."""

    def save(config: ModelConfig | None = None, **changes: Any) -> tuple[MobileLLM, Path, Path]:
        checkpoint.save(tmp_path / "base", base_model(config), tokenizer, chat_template="from the base")
        model = adapted_model(config, **changes).eval()
        base, adapter = tmp_path / "base", tmp_path / "run" / "adapter"
        save_adapter(adapter, model, str(base), tokenizer, "{{ messages }}")
        return model, base, adapter

    return save


def quiet(notice: str) -> None:
    raise AssertionError(notice)


@KIND
@torch.no_grad()
def test_stock_peft_loads_the_adapter_on_the_transformers_face(
    saved: Callable[..., tuple[MobileLLM, Path, Path]], kind: str
) -> None:
    import transformers

    import mobilellm.hf

    assert mobilellm.hf.MobileLLMForCausalLM is not None  # makes the Auto classes know it
    model, base, adapter = saved(**KINDS[kind])
    face = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(face, adapter).eval()
    tokens = some_tokens()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    at_once = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    torch.testing.assert_close(at_once(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


@KIND
@torch.no_grad()
def test_an_adapter_that_peft_saved_is_merged(tmp_path: Path, kind: str) -> None:
    import mobilellm.hf

    base = base_model()
    checkpoint.save(tmp_path / "base", base, None)
    changes = {"rank": 4, "targets": TARGETS, "dora": False, "rslora": False} | KINDS[kind]
    config = peft.LoraConfig(
        r=changes["rank"], target_modules=list(changes["targets"]), use_dora=changes["dora"],
        use_rslora=changes["rslora"], init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(mobilellm.hf.from_mobilellm(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    notices = list[str]()
    done = merge_adapter(tmp_path / "adapter", tmp_path / "base", notices.append)
    assert len(notices) == 1
    assert "does not say which weights it was trained on" in notices[0]
    tokens = some_tokens()
    torch.testing.assert_close(done.model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_load_takes_an_adapter_or_its_run_and_carries_tokenizer_and_template(
    saved: Callable[..., tuple[MobileLLM, Path, Path]], tokenizer: Tokenizer
) -> None:
    model, _, adapter = saved(dora=True)
    tokens = some_tokens()
    for source in (adapter, adapter.parent):
        loaded = mobilellm.load(source, say=quiet)
        torch.testing.assert_close(loaded.model(tokens), model(tokens), atol=1e-5, rtol=1e-5)
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
        assert loaded.chat_template == "{{ messages }}"
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer.json").unlink()
    loaded = mobilellm.load(adapter, dtype="bfloat16", say=quiet)
    assert loaded.chat_template == "from the base"
    assert loaded.tokenizer is not None
    assert loaded.model.head_weight.dtype == torch.bfloat16


def test_saving_again_replaces_an_adapter_and_nothing_else(
    saved: Callable[..., tuple[MobileLLM, Path, Path]],
) -> None:
    model, base, adapter = saved()
    before = read_safetensors(adapter / "adapter_model.safetensors")
    save_adapter(adapter, model, str(base), None, None)
    after = read_safetensors(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (adapter / "tokenizer.json").exists()
    (adapter / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_adapter(adapter, model, str(base), None, None)


def test_another_base_is_refused(saved: Callable[..., tuple[MobileLLM, Path, Path]], tmp_path: Path) -> None:
    _, base, adapter = saved()
    checkpoint.save(tmp_path / "other", base_model(seed=1), None)
    with pytest.raises(ValueError, match=r"trained on other weights than those of .*other \(SHA-256"):
        merge_adapter(adapter, tmp_path / "other", quiet)
    for changes in ({"hidden_size": 32, "head_dim": 8}, {"num_layers": 3}, {"num_layers": 1}):
        config = replace(preset("test-ls"), **changes)
        checkpoint.save(tmp_path / "shape", base_model(config), None, overwrite=True)
        with pytest.raises(ValueError, match=r"adapter of another model than .*shape"):
            merge_adapter(adapter, tmp_path / "shape", quiet)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"was trained on .*base, which is not there; name .* --model"
    ):
        merge_adapter(adapter, None, quiet)
    merge_adapter(adapter, tmp_path / "moved", quiet)


def test_the_fingerprint_goes_by_values() -> None:
    tensors = dict(base_model().bfloat16().named_parameters())
    wide = {name: tensor.float() for name, tensor in reversed(tensors.items())}
    assert fingerprint(tensors) == fingerprint(wide)
    wide["model.norm.weight"] = wide["model.norm.weight"] + 1e-6
    assert fingerprint(tensors) != fingerprint(wide)


def damage_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type is IA3; only LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        ({"target_modules": ["c_attn"]}, "does not fit .*c_attn"),
        ({"target_modules": ["q_proj"]}, "has no place in it"),
        ({"r": 3}, r"is \(4, "),
        ({"base_model_name_or_path": None}, "name the model with --model"),
    ],
)
def test_what_is_no_adapter_for_it_is_refused(
    saved: Callable[..., tuple[MobileLLM, Path, Path]], changes: dict[str, Any], words: str
) -> None:
    _, _, adapter = saved()
    damage_config(adapter, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        merge_adapter(adapter, None, quiet)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files(saved: Callable[..., tuple[MobileLLM, Path, Path]]) -> None:
    _, base, adapter = saved()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json there"):
        merge_adapter(base, None, quiet)
    with pytest.raises(FileNotFoundError, match=r"is an adapter, not a whole model; .*mobilellm merge"):
        checkpoint.read_weights(adapter)
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        merge_adapter(adapter, None, quiet)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole adapter"):
        merge_adapter(adapter, None, quiet)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: Expecting"):
        merge_adapter(adapter, None, quiet)


def test_nothing_of_peft_is_imported_for_a_model_without_adapters() -> None:
    code = (
        "import sys, torch, mobilellm.model.api, mobilellm.model.training\n"
        "assert not {'peft', 'transformers'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
