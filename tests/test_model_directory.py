"""Which directory holds a model, what stands for it, and what one that holds none is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobilellm.config import ConfigError, ModelConfig
from mobilellm.model_directory import is_adapter, model_in, read_config_file
from official_configs import OFFICIAL


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(OFFICIAL), encoding="utf-8")
    return path


def test_a_run_stands_for_its_model_else_its_adapter(tmp_path: Path) -> None:
    assert model_in(tmp_path) == tmp_path
    adapter = made(tmp_path / "adapter" / "adapter_config.json").parent
    assert model_in(tmp_path) == model_in(adapter) == adapter
    assert is_adapter(adapter)
    model = made(tmp_path / "model" / "config.json").parent
    assert model_in(tmp_path) == model_in(model) == model
    made(tmp_path / "config.json")
    assert model_in(tmp_path) == tmp_path


def test_a_run_without_a_model(tmp_path: Path) -> None:
    """Killed before its first end."""
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="run: a training run that has no model yet; go on with"):
        model_in(tmp_path / "run")


def test_an_adapter_is_no_whole_model(tmp_path: Path) -> None:
    made(tmp_path / "adapter_config.json")
    assert is_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="is an adapter, not a whole model; make one with: mobilellm"):
        read_config_file(tmp_path)
    made(tmp_path / "config.json")
    assert not is_adapter(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"model_type": ' + b"9" * 5000 + b"}"],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config_file(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="no config.json there"):
            read_config_file(path)


def test_a_folder_of_models(tmp_path: Path) -> None:
    for name in ("base/model", "chat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(OFFICIAL), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="name one of the models in it: base, chat"):
        read_config_file(tmp_path)


def test_an_export_is_no_model(tmp_path: Path) -> None:
    exported = OFFICIAL | {"transformers.js_config": {"dtype": "q4"}}
    (tmp_path / "config.json").write_text(json.dumps(exported), encoding="utf-8")
    (tmp_path / "onnx").mkdir()
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match="belongs to an export to ONNX, which generate, chat"):
            read_config_file(path)
    (tmp_path / "model.safetensors").touch()  # a model on the Hub may have both
    with pytest.raises(ConfigError, match="unknown keys .'transformers.js_config'"):
        read_config_file(tmp_path)


def test_a_file_or_its_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL), encoding="utf-8")
    assert read_config_file(tmp_path) == read_config_file(tmp_path / "config.json")
    assert isinstance(read_config_file(str(tmp_path)).config, ModelConfig)
