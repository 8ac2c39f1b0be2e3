"""What is said of a model that came from a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilellm.runtime.session import RuntimeModel, load
from mobilellm.serve.facts import facts, facts_of_now
from mobilellm.serve.prepared import Preparer
from mobilellm.serve.settings import Limits


@pytest.fixture(scope="module")
def model(chat_file: Path) -> RuntimeModel:
    return load(str(chat_file), 1, say=lambda line: None)


def named(model: RuntimeModel, source: Path | str) -> RuntimeModel:
    return RuntimeModel(model.engine, model.tokenizer, str(source), None)


def test_the_bytes_of_a_training_run_are_those_of_its_model(model: RuntimeModel, tmp_path: Path) -> None:
    for name, size in (("model/config.json", 10), ("model/model.safetensors", 500), ("checkpoints/1", 9000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert facts(named(model, tmp_path))["file_bytes"] == 510
    assert facts(named(model, tmp_path / "model"))["file_bytes"] == 510
    assert facts(model)["file_bytes"] == Path(model.source).stat().st_size


def test_threads_are_those_of_now(model: RuntimeModel) -> None:
    assert facts_of_now(model)["threads"] == 1
    assert "threads" not in facts(model)
    assert facts_of_now(model)["memory_bytes"] > 0


def test_what_lies_elsewhere_is_not_measured(model: RuntimeModel, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    for source in ("organisation/model", tmp_path):
        assert facts(named(model, source))["file_bytes"] is None


def test_the_directory_one_stands_in_has_a_name(
    model: RuntimeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Preparer(named(model, "."), Limits()).name == tmp_path.name
    assert Preparer(named(model, "organisation/model"), Limits()).name == "model"
    assert Preparer(model, Limits()).name == "small"
