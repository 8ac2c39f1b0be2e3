"""config.json: every official layout is understood, everything that cannot be honoured is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.config import ORDERS, ConfigError
from mobilellm.layouts import MODEL_TYPES, config_json, parse_config
from mobilellm.presets import preset, preset_names
from official_configs import LLAMA, OFFICIAL


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "dir/config.json")
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message
    return message


def test_the_official_125m() -> None:
    read = parse_config(OFFICIAL)
    assert read.config == preset("125m")
    assert read.model_type == "mobilellm"
    assert len(read.repairs) == 1  # its two keys about tying disagree
    assert "share_embedding = true" in read.repairs[0]
    assert "tied to" in read.repairs[0]


def test_the_official_layer_share() -> None:
    read = parse_config(OFFICIAL | {"layer_sharing": True, "use_cache": False})
    assert read.config == preset("ls-125m")


def test_the_official_1_5b_is_an_untied_llama() -> None:
    read = parse_config(LLAMA)
    assert read.config == replace(preset("1.5b"), tie_word_embeddings=False)
    assert read.repairs == ()


def test_share_embedding_wins_where_it_is_false() -> None:
    read = parse_config(OFFICIAL | {"share_embedding": False, "tie_word_embeddings": True})
    assert not read.config.tie_word_embeddings
    assert "separate from" in read.repairs[0]


@pytest.mark.parametrize("tied", [True, False, None])
def test_llama_obeys_tie_word_embeddings(tied: bool | None) -> None:
    assert parse_config(LLAMA | {"tie_word_embeddings": tied}).config.tie_word_embeddings == bool(tied)
    without = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    assert not parse_config(without).config.tie_word_embeddings


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_written_is_read_back(name: str, model_type: str) -> None:
    config = preset(name)
    if model_type == "llama" and config.shares_layers:
        with pytest.raises(ValueError, match="cannot share layers"):
            config_json(config, model_type, "float32")
        return
    text = json.dumps(config_json(config, model_type, "float32"))
    read = parse_config(json.loads(text))
    assert (read.config, read.model_type, read.repairs) == (config, model_type, ())


@given(
    st.sampled_from(ORDERS),
    st.integers(2, 5),
    st.booleans(),
    st.floats(1e-3, 1e7),
    st.sampled_from([1e-6, 1e-5, 0.5]),
)
def test_sharing_tying_and_numbers_survive(
    order: str, repeats: int, tied: bool, theta: float, eps: float
) -> None:
    config = replace(
        preset("test"),
        order=order,
        repeats=repeats,
        tie_word_embeddings=tied,
        rope_theta=theta,
        rms_norm_eps=eps,
        head_dim=18,
    )
    written = json.loads(json.dumps(config_json(config, "mobilellm", "bfloat16")))
    assert parse_config(written).config == config


def test_what_stock_transformers_writes_is_read() -> None:
    from stock_llama import stock_config

    config = preset("350m")
    stock = stock_config(config, architectures=["LlamaForCausalLM"])
    read = parse_config(json.loads(stock.to_json_string()))
    assert (read.config, read.model_type, read.repairs) == (config, "llama", ())


@pytest.mark.parametrize("model_type", [None, "llama4_text", "qwen3", ["llama"], 3])
def test_unknown_model_types_are_refused(model_type: Any) -> None:
    assert f"model_type = {model_type!r}" in refused(OFFICIAL | {"model_type": model_type})


def test_unknown_missing_and_unsupported_keys_are_all_listed_at_once() -> None:
    values = OFFICIAL | {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "hidden_act": "gelu",
        "attention_bias": True,
        "qk_norm": True,
        "num_experts": 8,
        "sliding_window": 512,
        "layer_types": ["full_attention", "sliding_attention"],
        "layer_sharing_order": "reverse",
    }
    for key in ("rope_theta", "num_hidden_layers", "share_embedding", "rms_norm_eps"):
        del values[key]
    message = refused(values)
    for key in (
        "rope_theta",
        "num_hidden_layers",
        "share_embedding",
        "rms_norm_eps",
        "qk_norm",
        "num_experts",
    ):
        assert repr(key) in message
    for text in ("rope_scaling = {", "hidden_act = 'gelu'", "attention_bias = True", "sliding_window = 512"):
        assert text in message
    assert "layer_types" in message
    assert "layer_sharing_order" in message


@pytest.mark.parametrize("key", ["vocab_size", "rope_theta", "rms_norm_eps", "hidden_size"])
@pytest.mark.parametrize("null", [True, False])
def test_nothing_of_the_shape_is_guessed(key: str, null: bool) -> None:
    values = LLAMA | {key: None}
    if not null:
        del values[key]
    assert f"missing keys ['{key}']" in refused(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": "30"}, "num_hidden_layers = '30' must be of type int"),
        (
            {"num_attention_heads": 10},
            "num_attention_heads = 10 must be a multiple of num_key_value_heads = 3",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 must be at least 1"),
        ({"layer_sharing": "false"}, "layer_sharing = 'false' must be true or false"),
        ({"share_embedding": 1}, "share_embedding = 1 must be true or false"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' must be true or false"),
        ({"layer_sharing": True, "layer_sharing_repeats": 0}, "layer_sharing_repeats = 0 must be at least 1"),
        ({"layer_sharing": True, "layer_sharing_repeats": None}, "layer_sharing_repeats = None must be"),
        (
            {"layer_sharing": True, "layer_sharing_order": "ABBA"},
            "layer_sharing_order = 'ABBA' must be one of",
        ),
        ({"layer_sharing_repeats": 2}, "layer_sharing_repeats = 2 has no meaning without layer_sharing"),
        ({"head_dim": None, "hidden_size": 9}, "head_dim = 1 must be even"),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_parameters = {'rope_type': 'llama3'} is not supp",
        ),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor': 0.5"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta = 10000.0 disagrees with rope_parameters"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default' is not supported"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": [{}]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
        ({"vocab_size": True}, "vocab_size = True must be of type int"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be positive and finite"),
    ],
)
def test_one_thing_wrong(change: dict[str, Any], says: str) -> None:
    assert says in refused(OFFICIAL | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_sharing": True}, "layer_sharing = True needs model_type 'mobilellm'"),
        ({"share_embedding": True}, "share_embedding = True disagrees with tie_word_embeddings = False"),
    ],
)
def test_a_llama_that_says_what_llamas_pass_over(change: dict[str, Any], says: str) -> None:
    assert says in refused(LLAMA | change)


def test_plain_rope_parameters_are_as_good_as_rope_theta() -> None:
    values = {key: value for key, value in OFFICIAL.items() if key != "rope_theta"}
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    assert parse_config(values | {"rope_parameters": rope}).config.rope_theta == 5e5


def test_layouts_and_dtypes_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="layout 'gpt2' is not known; choose one of llama, mobilellm"):
        config_json(preset("test"), "gpt2", "float32")
