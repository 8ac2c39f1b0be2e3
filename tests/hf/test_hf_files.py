"""The transformers face on disk: its config, saving, loading, refusing, and conversion to our own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_models import SHAPE, plain_model, shared_model, some_tokens, stock_twin
from transformers import LlamaConfig, LlamaForCausalLM

import mobilellm.hf
from mobilellm.config import ORDERS, ModelConfig
from mobilellm.hf import MobileLLMConfig, MobileLLMForCausalLM, from_mobilellm, to_mobilellm
from mobilellm.model.checkpoint import build, read_weights
from mobilellm.model.transformer import MobileLLM


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# --- configuration ---


@pytest.mark.parametrize("order", ORDERS)
def test_schedule_is_the_library_s(order: str) -> None:
    for blocks in (1, 2, 5):
        for repeats in (2, 3, 4):
            config = MobileLLMConfig(
                num_hidden_layers=blocks,
                layer_sharing=True,
                layer_sharing_repeats=repeats,
                layer_sharing_order=order,
            )
            ours = ModelConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=blocks, num_heads=1,
                num_kv_heads=1, head_dim=8, max_position_embeddings=8, repeats=repeats, order=order,
            )  # fmt: skip
            assert config.schedule == ours.schedule
            assert config.num_steps == ours.num_steps


def test_caches_are_sized_by_a_config_of_their_own() -> None:
    config = shared_model("reverse", 3).config
    before = config.to_dict()
    unrolled = config.get_text_config(decoder=True)
    assert (unrolled.num_hidden_layers, unrolled.num_steps) == (6, 6)
    assert unrolled.get_text_config(decoder=True) is unrolled
    assert config.get_text_config() is config
    assert config.to_dict() == before
    assert plain_model().config.get_text_config(decoder=True).num_hidden_layers == 2


def test_what_official_files_leave_out_or_contradict() -> None:
    official = {
        "layer_sharing": True,
        "share_embedding": True,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    config = MobileLLMConfig(**official)
    assert config.layer_sharing_repeats == 2
    assert config.tie_word_embeddings
    assert config.use_cache
    assert config.to_dict()["share_embedding"] is True
    assert not MobileLLMConfig(**official | {"share_embedding": False}).tie_word_embeddings
    assert not MobileLLMConfig(**official, layer_sharing_repeats=2).use_cache  # ours mean what they say
    assert not MobileLLMConfig(use_cache=False).use_cache


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"num_key_value_heads": 2}, "num_attention_heads = 9 .* num_key_value_heads = 2"),
        ({"head_dim": 63}, "head_dim = 63 must be even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
        (
            {"layer_sharing": True, "layer_sharing_order": "backwards"},
            "'backwards'.*immediate, all-over, reverse",
        ),
        ({"layer_sharing_repeats": 2}, "layer_sharing_repeats = 2 needs layer_sharing"),
        ({"layer_sharing_order": "reverse"}, "'reverse' has no effect"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias = True .*; mlp_bias = True"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters = .*linear",
        ),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"layer_types": ["sliding_attention"] * 30}, "layer_types"),
    ],
)
def test_what_is_not_computed_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MobileLLMConfig(**values)
    assert "\n" not in str(caught.value)


# --- saving and loading ---


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    model = shared_model("reverse", 3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = MobileLLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(some_tokens()).logits, model(some_tokens()).logits)
    assert again.config.to_json_string() == model.config.to_json_string()
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert len([name for name in tensors if name.endswith("q_proj.weight")]) == 2
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied


def test_the_library_s_own_strict_loader_takes_what_is_saved(tmp_path: Path) -> None:
    model = shared_model("all-over", 3)
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.repairs == ()
    close(build(weights)(some_tokens()), model(some_tokens()).logits)


def damage(directory: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "missing tensors model.layers.1.mlp.up_proj.weight",
        ),
        (lambda t: t.pop("model.embed_tokens.weight"), "missing tensors .*model.embed_tokens.weight"),
        (lambda t: t.update(extra=torch.ones(3)), "unknown tensors extra"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "NaN or infinity in model.norm.weight"),
    ],
    ids=["missing", "no embedding", "unknown", "NaN"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    shared_model().save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        MobileLLMForCausalLM.from_pretrained(tmp_path)


def test_rotary_tables_in_old_files_are_not_needed(tmp_path: Path) -> None:
    model = shared_model()
    model.save_pretrained(tmp_path)
    damage(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    again = MobileLLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(some_tokens()).logits, model(some_tokens()).logits)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    shared_model().save_pretrained(tmp_path)
    damage(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises((ValueError, RuntimeError), match=r"mismatch|another shape"):
        MobileLLMForCausalLM.from_pretrained(tmp_path)


# --- to and from the library's own model ---


@pytest.mark.parametrize("tied", [True, False])
def test_conversions_share_the_parameters(tied: bool) -> None:
    config = ModelConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=64, initializer_range=0.2, repeats=3, order="reverse",
        tie_word_embeddings=tied,
    )  # fmt: skip
    ours = MobileLLM(config, torch.Generator().manual_seed(0)).eval()
    face = from_mobilellm(ours)
    close(face(some_tokens()).logits, ours(some_tokens()))
    back = to_mobilellm(face)
    assert back.config == config
    for model in (face, back):
        parameters = dict(model.named_parameters())
        assert all(parameters[name] is parameter for name, parameter in ours.named_parameters())
    assert (face.lm_head.weight is face.get_input_embeddings().weight) is tied
    assert not face.training
    assert not back.training
    close(
        face.generate(some_tokens(), max_new_tokens=2, do_sample=False), to_generate(ours, some_tokens(), 2)
    )


def to_generate(model: MobileLLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_stock_llama_becomes_ours() -> None:
    model = plain_model(tie_word_embeddings=False)
    twin = stock_twin(model)
    close(to_mobilellm(twin)(some_tokens()), twin(some_tokens()).logits)


def test_what_ours_does_not_compute_is_not_converted() -> None:
    scaled = LlamaConfig(
        **SHAPE,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    with pytest.raises(ValueError, match="rope_parameters"):
        to_mobilellm(LlamaForCausalLM(scaled))
    model = plain_model()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"MobileLLMForCausalLM: .*extra"):
        to_mobilellm(model)


def test_saved_files_are_text_of_this_package(tmp_path: Path) -> None:
    shared_model().save_pretrained(tmp_path)
    home = Path(mobilellm.hf.__file__).parent
    for name in ("configuration_mobilellm.py", "modeling_mobilellm.py"):
        assert (tmp_path / name).read_text() == (home / name).read_text()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    }
