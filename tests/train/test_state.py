"""Checkpoints: whole or not there, refused with a name when damaged, no more of them than asked for."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_runs import LS, same_weights, stop_at, tiny_loader, tiny_model, tiny_run, tiny_settings

from mobilellm.model.transformer import MobileLLM
from mobilellm.train.loop import run_identity
from mobilellm.train.optim import adamw, build_optimizer
from mobilellm.train.state import RunState, checkpoints, drop_old, load_state, only_run, save_state

SETTINGS = tiny_settings()
FILES = ("model.safetensors", "state.json", "training.safetensors")


def optimised(seed: int) -> tuple[MobileLLM, torch.optim.Optimizer]:
    """A model and its optimiser after one step."""
    model = tiny_model()
    optimizer = adamw(model, SETTINGS)
    step(model, optimizer, seed)
    return model, optimizer


def step(model: MobileLLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """With random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def save(directory: Path, step: int, keep: int = 100) -> Path:
    model, optimizer = optimised(step)
    return save_state(directory, RunState(step, {"window": step}, identity()), model, optimizer, keep)


def identity() -> dict[str, Any]:
    return run_identity(tiny_model(), SETTINGS)


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = optimised(1)
    torch.manual_seed(3)
    path = save_state(tmp_path, RunState(12, {"window": 48}, identity()), model, optimizer, 2)
    assert path == tmp_path / "step-00000012"
    assert sorted(item.name for item in path.iterdir()) == list(FILES)
    drawn = torch.rand(5)
    other, other_optimizer = optimised(2)
    assert load_state(path, other, other_optimizer, identity()) == RunState(12, {"window": 48}, identity())
    assert torch.equal(torch.rand(5), drawn)
    assert same_weights(model, other)
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, moments in ours["state"].items():
        assert moments.keys() == theirs["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in moments.items():
            assert torch.equal(tensor, theirs["state"][index][name])
            assert tensor.dtype == theirs["state"][index][name].dtype


def test_a_fresh_optimiser_steps_on_as_the_old_one(tmp_path: Path) -> None:
    model, optimizer = optimised(1)
    path = save_state(tmp_path, RunState(1, {}, identity()), model, optimizer, 2)
    other = tiny_model()
    other_optimizer = adamw(other, SETTINGS)  # it has no moments yet
    load_state(path, other, other_optimizer, identity())
    step(model, optimizer, 2)
    step(other, other_optimizer, 2)
    assert same_weights(model, other)


def test_the_state_of_muon_too(tmp_path: Path) -> None:
    settings = tiny_settings(optimizer="muon")
    model, other = tiny_model(), tiny_model()
    optimizer, other_optimizer = build_optimizer(model, settings), build_optimizer(other, settings)
    step(model, optimizer, 1)
    path = save_state(tmp_path, RunState(1, {}, identity()), model, optimizer, 2)
    load_state(path, other, other_optimizer, identity())
    step(model, optimizer, 2)
    step(other, other_optimizer, 2)
    assert same_weights(model, other)


def test_the_tied_weight_is_stored_once(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(save(tmp_path, 1) / "model.safetensors")
    assert tensors.keys() == dict(tiny_model().named_parameters()).keys()
    assert "lm_head.weight" not in tensors


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11, 100_000_000):
        save(tmp_path, step, keep=3)
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path)]
        assert steps == sorted(steps)
        assert steps[-1] == step
        assert len(steps) == min(3, len(steps))
    assert steps == [10, 11, 100_000_000]
    assert len(list(tmp_path.iterdir())) == 3
    drop_old(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-100000000"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_loop_keeps_so_many(tmp_path: Path, keep: int) -> None:
    tiny_run(tmp_path, tiny_settings(checkpoint_every=2, keep_checkpoints=keep))
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path / "checkpoints")]
    assert steps == [2, 4, 6, 8, 10][-keep:]


def test_fewer_are_kept_when_one_goes_on_with_less(tmp_path: Path) -> None:
    tiny_run(tmp_path, tiny_settings(checkpoint_every=2, keep_checkpoints=5), on_record=stop_at(7))
    assert len(checkpoints(tmp_path / "checkpoints")) == 4
    tiny_run(tmp_path, tiny_settings(checkpoint_every=100, keep_checkpoints=1), on_record=stop_at(8))
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000008"]


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    whole = save(tmp_path, 5)
    for name in ("step-00000009.tmp-1-ab", "step-00000009.old-ab", "step-9.deleted", "step-x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    assert checkpoints(tmp_path) == [whole]
    assert checkpoints(tmp_path / "missing") == []


def test_remains_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = {"step-00000009.old-ab", "notes"}  # the first may be all there is of a checkpoint
    for name in ("step-00000009.tmp-1-ab", "step-00000002.deleted", *kept):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").touch()
    tiny_run(tmp_path, tiny_settings(steps=1))
    assert {path.name for path in folder.iterdir()} == {*kept, "step-00000001"}


def test_one_run_a_folder(tmp_path: Path) -> None:
    with only_run(tmp_path / "new"):
        with pytest.raises(ValueError, match=r"new: another process is training there"):
            only_run(tmp_path / "new").__enter__()
        with only_run(tmp_path / "other"):
            pass
    with only_run(tmp_path / "new"):
        pass


# Damage


def load(path: Path) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = adamw(model, SETTINGS)
    torch.manual_seed(9)
    random = torch.get_rng_state()
    try:
        load_state(path, model, optimizer, identity())
    finally:  # refused before anything was changed
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not optimizer.state_dict()["state"]
        assert torch.equal(torch.get_rng_state(), random)


def refused(path: Path, words: str = "") -> None:
    named = f"^{re.escape(str(path))}: damaged checkpoint \\(.*{re.escape(words)}.*; delete it to resume"
    with pytest.raises(ValueError, match=named) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "how", ["missing", "empty", "half", "one byte short", "one byte more", "noise", "text"]
)
def test_a_damaged_file(tmp_path: Path, name: str, how: str) -> None:
    path = save(tmp_path, 5)
    content = (path / name).read_bytes()
    changed = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "one byte short": content.rstrip()[:-1],
        "one byte more": content + b"x",
        "noise": bytes(255 - byte for byte in content),
        "text": b'"text"',
    }
    (path / name).unlink()
    if how in changed:
        (path / name).write_bytes(changed[how])
    refused(path, name if how == "missing" else "")


@pytest.mark.parametrize(
    "change",
    [{"step": "5"}, {"step": None}, {"loader": [1]}, {"identity": "text"}, {"more": 1}],
    ids=str,
)
def test_a_state_of_other_kinds(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path, 5)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | change))
    refused(path, next(iter(change)))
    del values["step"]
    (path / "state.json").write_text(json.dumps(values))
    refused(path, "step")


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("how", ["renamed", "extra", "misshaped"])
def test_other_tensors(tmp_path: Path, file: str, how: str) -> None:
    path = save(tmp_path, 5)
    tensors = safetensors.torch.load_file(path / file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    if how == "misshaped":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors["optimizer.999.exp_avg"] = tensors[name].clone() if how == "extra" else tensors.pop(name)
    safetensors.torch.save_file(tensors, path / file)
    refused(path, f"{file} holds other tensors")


@pytest.mark.parametrize("random", [None, torch.zeros(7, dtype=torch.uint8), torch.zeros(5056)])
def test_no_random_state(tmp_path: Path, random: torch.Tensor | None) -> None:
    path = save(tmp_path, 5)
    tensors = safetensors.torch.load_file(path / "training.safetensors")
    del tensors["random"]
    if random is not None:
        tensors["random"] = random
    safetensors.torch.save_file(tensors, path / "training.safetensors")
    refused(path, "training.safetensors holds other tensors")


def test_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    """As the message says."""
    tiny_run(tmp_path, on_record=stop_at(8))
    older, newest = checkpoints(tmp_path / "checkpoints")
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{re.escape(str(newest))}: damaged .*resume from the one before"):
        tiny_run(tmp_path)
    shutil.rmtree(newest)
    assert older.name == "step-00000006"
    second = tiny_run(tmp_path)
    whole = tiny_run(tmp_path / "other")
    assert second.losses == whole.losses[6:]
    assert same_weights(second.model, whole.model)


def test_a_checkpoint_of_another_run_names_what_differs(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    other = replace(LS, rope_theta=5000.0)
    theirs = run_identity(tiny_model(other), tiny_settings(weight_decay=0.0))
    with pytest.raises(ValueError) as caught:
        load_state(path, *optimised(2), theirs)
    assert str(caught.value) == (
        f"{path}: belongs to a run with other settings (rope_theta = 10000.0, not 5000.0; "
        "weight_decay = 0.1, not 0.0); use another folder or the same settings"
    )


def test_every_setting_that_changes_the_outcome_is_part_of_the_identity() -> None:
    habits = {"evaluate_every", "checkpoint_every", "keep_checkpoints", "micro_batch"}
    expected = {**LS.to_dict(), **vars(SETTINGS)}
    assert identity() == {name: value for name, value in expected.items() if name not in habits}
    json.dumps(identity())


def test_the_loader_s_state_is_json() -> None:
    state = tiny_loader(SETTINGS).state()
    assert json.loads(json.dumps(state)) == state
