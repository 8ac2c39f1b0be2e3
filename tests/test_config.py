"""ModelConfig: strict, frozen, round-trips; the schedule of shared layers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.config import ORDERS, ConfigError, ModelConfig
from mobilellm.presets import PUBLISHED, preset, preset_names

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}

SCHEDULES = {  # of blocks 0 1 2, written out by hand
    ("immediate", 1): (0, 1, 2),
    ("immediate", 2): (0, 0, 1, 1, 2, 2),
    ("immediate", 3): (0, 0, 0, 1, 1, 1, 2, 2, 2),
    ("all-over", 2): (0, 1, 2, 0, 1, 2),
    ("all-over", 3): (0, 1, 2, 0, 1, 2, 0, 1, 2),
    ("reverse", 2): (0, 1, 2, 2, 1, 0),
    ("reverse", 3): (0, 1, 2, 2, 1, 0, 0, 1, 2),
    ("reverse", 4): (0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0),
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    counts = st.integers(1, 10**6)
    kv_heads, repeats = draw(st.integers(1, 64)), draw(st.integers(1, 5))
    positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
    return ModelConfig(
        vocab_size=draw(counts),
        hidden_size=draw(counts),
        intermediate_size=draw(counts),
        num_layers=draw(st.integers(1, 100)),
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 256)),
        max_position_embeddings=draw(counts),
        rope_theta=draw(positive),
        rms_norm_eps=draw(positive),
        initializer_range=draw(positive),
        tie_word_embeddings=draw(st.booleans()),
        repeats=repeats,
        order=draw(st.sampled_from(ORDERS)) if repeats > 1 else "immediate",
    )


@pytest.mark.parametrize(("how", "expected"), SCHEDULES.items(), ids=lambda value: str(value))
def test_schedule(how: tuple[str, int], expected: tuple[int, ...]) -> None:
    config = ModelConfig(**SHAPE, order=how[0], repeats=how[1])
    assert config.schedule == expected
    assert config.num_steps == len(expected)
    assert config.shares_layers == (how[1] > 1)


@given(configs())
def test_every_schedule_runs_every_block_equally_often(config: ModelConfig) -> None:
    assert len(config.schedule) == config.num_steps
    assert sorted(config.schedule) == sorted(list(range(config.num_layers)) * config.repeats)
    assert config.schedule[: config.repeats if config.order == "immediate" else 1] == (
        (0,) * (config.repeats if config.order == "immediate" else 1)
    )
    unrolled = config.unrolled()
    assert unrolled.schedule == tuple(range(config.num_steps))
    assert dataclasses.replace(config, num_layers=1, repeats=1, order="immediate") == dataclasses.replace(
        unrolled, num_layers=1
    )


@given(configs())
def test_json_round_trips_byte_for_byte(config: ModelConfig) -> None:
    text = config.to_json()
    again = ModelConfig.from_json(text)
    assert again == config
    assert again.to_json() == text
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert hash(again) == hash(config)


def test_every_preset_round_trips() -> None:
    assert set(PUBLISHED) < set(preset_names())
    for name in preset_names():
        config = preset(name)
        assert ModelConfig.from_json(config.to_json()) == config
        assert config.hidden_size == config.num_heads * config.head_dim


def test_frozen() -> None:
    config = ModelConfig(**SHAPE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 4  # type: ignore[misc]


def test_whole_numbers_stand_for_floats() -> None:
    config = ModelConfig.from_json(json.dumps(SHAPE | {"rope_theta": 10000, "rms_norm_eps": 1}))
    assert config.rope_theta == 10000.0
    assert isinstance(config.rope_theta, float)
    assert config == ModelConfig(**SHAPE, rope_theta=1e4, rms_norm_eps=1.0)
    assert ModelConfig.from_json(config.to_json()).to_json() == config.to_json()


def test_unknown_and_missing_keys_are_all_listed() -> None:
    values = {key: value for key, value in SHAPE.items() if key not in ("num_heads", "head_dim")}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values | {"n_layer": 3, "dropout": 0.1}, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ")
    for key in ("n_layer", "dropout", "num_heads", "head_dim"):
        assert repr(key) in message
    assert "\n" not in message


def test_every_bad_field_is_listed_at_once() -> None:
    bad = SHAPE | {
        "vocab_size": "97",
        "hidden_size": 0,
        "num_layers": True,
        "num_heads": 5,
        "head_dim": 15,
        "rope_theta": float("nan"),
        "rms_norm_eps": float("inf"),
        "tie_word_embeddings": "false",
        "initializer_range": -0.1,
        "order": "forward",
    }
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(bad, "here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    for name in bad.keys() - {"intermediate_size", "num_kv_heads", "max_position_embeddings"}:
        assert f"{name} = " in message
    for name in ("intermediate_size", "max_position_embeddings"):
        assert name not in message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("repeats", 0, "repeats = 0 must be at least 1"),
        ("repeats", 2.0, "repeats = 2.0 must be of type int"),
        ("order", "reverse", "no effect with repeats = 1"),
        ("order", ["reverse"], "must be of type str"),
        ("num_kv_heads", 3, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ("num_kv_heads", 0, "num_kv_heads = 0 must be at least 1"),
        ("num_kv_heads", None, "num_kv_heads = None must be of type int"),
        ("head_dim", -2, "head_dim = -2 must be at least 1"),
        ("rope_theta", 10**400, "must be of type float"),
        ("rope_theta", False, "must be of type float"),
        ("rope_theta", 0, "must be positive and finite"),
    ],
)
def test_one_bad_field(field: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match="model config: ") as caught:
        ModelConfig(**(SHAPE | {field: value}))
    assert says in str(caught.value)
    assert str(caught.value).count(" must be ") + str(caught.value).count(" has no effect ") == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "NaN", '"x"', "[" * 100_000, "\ufeff{}", "9" * 5000]
)
def test_not_a_config(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here\.json: ") as caught:
        ModelConfig.from_json(text, "here.json")
    assert "\n" not in str(caught.value)


def test_preset_names_are_forgiving_and_others_refused() -> None:
    assert preset("MobileLLM-125M") == preset("125m")
    assert preset("MobileLLM-125M-layer-share") == preset("ls-125m")
    assert preset("ls-125m").repeats == 2
    with pytest.raises(ValueError, match="preset '126m' is not known; presets are 125m, "):
        preset("126m")
