"""Checkpoints: whole or not there, refused with a name when damaged, no more of them than asked for."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import LS, leaves, same_weights, stop_at, tiny_loader, tiny_model, tiny_run, tiny_settings

import mobilellm.train.state
from mobilellm.data.shards import file_sha256
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.checkpoint_files import (
    RunState,
    checkpoints,
    drop_old,
    only_run,
    read_state,
    write_state,
)
from mobilellm.train.distributed import ToldByAnother, World
from mobilellm.train.loop import run_identity
from mobilellm.train.optim import adamw, build_optimizer
from mobilellm.train.settings import CheckpointSettings, TrainSettings
from mobilellm.train.state import Checkpointer, _plain_errors, load_state, load_weights

SETTINGS = tiny_settings()
WEIGHTS = "shard-00001-model-00001-of-00001.safetensors"
ALONE = World()


def optimised(seed: int) -> tuple[MobileLLM, torch.optim.Optimizer]:
    """A model and its optimiser after one step."""
    model = tiny_model()
    optimizer = adamw(model, SETTINGS.optim)
    step(model, optimizer, seed)
    return model, optimizer


def step(model: MobileLLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """With random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def write(
    directory: Path,
    step: int,
    model: MobileLLM,
    optimizer: torch.optim.Optimizer,
    loader: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    checkpointer = Checkpointer(directory, CheckpointSettings(**settings), ALONE)
    checkpointer.save(RunState(step, loader or {}, identity()), model, optimizer)
    checkpointer.wait()
    return directory / f"step-{step:08d}"


def save(directory: Path, step: int, keep: int = 100) -> Path:
    return write(directory, step, *optimised(step), loader={"windows": [step]}, keep_last=keep)


def identity() -> dict[str, Any]:
    return run_identity(tiny_model(), SETTINGS)


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then its name is."""
    order: list[int] = []  # inodes; 0 for a rename
    sync, rename = os.fsync, os.rename

    def noted_sync(descriptor: int) -> None:
        order.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        order.append(0)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    path = save(tmp_path, 1)
    named = order.index(0)
    assert {each.stat().st_ino for each in (path, *path.iterdir())} <= {*order[:named]}
    assert order[named:] == [0, tmp_path.stat().st_ino]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_everything_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    model, optimizer = optimised(1)
    path = write(tmp_path, 12, model, optimizer, {"windows": [48]}, asynchronous=asynchronous)
    assert sorted(item.name for item in path.iterdir()) == [WEIGHTS, "state.json"]
    other, other_optimizer = optimised(2)
    state = load_state(path, other, other_optimizer, identity(), ALONE)
    assert type(state.losses) is tuple
    assert state == RunState(12, {"windows": [48]}, identity())
    assert same_weights(model, other)
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, moments in ours["state"].items():
        assert moments.keys() == theirs["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in moments.items():
            assert torch.equal(tensor, theirs["state"][index][name])
            assert tensor.dtype == theirs["state"][index][name].dtype


def test_the_weights_alone(tmp_path: Path) -> None:
    model, optimizer = optimised(1)
    path = write(tmp_path, 1, model, optimizer)
    other = tiny_model()
    load_weights(path, other)
    assert same_weights(model, other)
    with pytest.raises(ValueError, match=r"damaged checkpoint \(model.embed_tokens.weight is \(384, 64\)"):
        load_weights(path, tiny_model(replace(LS, hidden_size=32, head_dim=8)))
    (path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=f"damaged checkpoint .*{WEIGHTS} is not what was written"):
        load_weights(path, other)


def test_a_fresh_optimiser_steps_on_as_the_old_one(tmp_path: Path) -> None:
    model, optimizer = optimised(1)
    path = write(tmp_path, 1, model, optimizer)
    other = tiny_model()
    other_optimizer = adamw(other, SETTINGS.optim)  # it has no moments yet
    load_state(path, other, other_optimizer, identity(), ALONE)
    step(model, optimizer, 2)
    step(other, other_optimizer, 2)
    assert same_weights(model, other)


def test_the_state_of_muon_too(tmp_path: Path) -> None:
    settings = tiny_settings(**{"optim.name": "muon"}).optim
    model, other = tiny_model(), tiny_model()
    optimizer, other_optimizer = build_optimizer(model, settings), build_optimizer(other, settings)
    step(model, optimizer, 1)
    path = write(tmp_path, 1, model, optimizer)
    load_state(path, other, other_optimizer, identity(), ALONE)
    step(model, optimizer, 2)
    step(other, other_optimizer, 2)
    assert same_weights(model, other)


def test_the_tied_weight_is_stored_once(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(save(tmp_path, 1) / WEIGHTS)
    names = dict(tiny_model().named_parameters()).keys()
    assert {name for name in tensors if name.startswith("model.")} == {f"model.{name}" for name in names}
    assert not any("lm_head" in name for name in tensors)
    assert len(tensors) == 4 * len(names)


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that is larger than a file should be."""
    monkeypatch.setattr(mobilellm.train.state, "_FILE_BYTES", 100_000)
    model, optimizer = optimised(1)
    path = write(tmp_path, 1, model, optimizer)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 5
    assert max(file.stat().st_size for file in files) < 250_000  # the embedding is one tensor
    other, other_optimizer = optimised(2)
    load_state(path, other, other_optimizer, identity(), ALONE)
    assert same_weights(model, other)
    files[3].unlink()
    refused(path, f"{files[3].name} is missing")


# In the background


def test_in_the_background_a_copy_is_written(tmp_path: Path) -> None:
    """What is changed after `save` has returned is not in the checkpoint."""
    model, optimizer = optimised(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpointer = Checkpointer(tmp_path, CheckpointSettings(asynchronous=True), ALONE)
    checkpointer.save(RunState(1, {}, identity()), model, optimizer)
    for number in range(2, 5):
        step(model, optimizer, number)
    checkpointer.wait()
    other, other_optimizer = optimised(2)
    load_state(tmp_path / "step-00000001", other, other_optimizer, identity(), ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert {int(state["step"]) for state in other_optimizer.state.values()} == {1}


def test_in_the_background_it_is_the_same_run(tmp_path: Path) -> None:
    runs = [
        tiny_run(tmp_path / f"{background}", tiny_settings(asynchronous=background, milestone_every=3))
        for background in (False, True)
    ]
    assert runs[0].losses == runs[1].losses
    found = [
        {
            path.name: safetensors.torch.load_file(path / WEIGHTS)
            for path in checkpoints(tmp_path / f"{background}" / "checkpoints")
        }
        for background in (False, True)
    ]
    assert list(found[0]) == list(found[1]) == [f"step-{number:08d}" for number in (3, 6, 9, 10)]
    for name, tensors in found[0].items():
        assert tensors.keys() == found[1][name].keys()
        assert all(torch.equal(tensor, found[1][name][key]) for key, tensor in tensors.items())


def test_an_error_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, rename = [True], os.rename

    def failing(source: Path, target: Path) -> None:
        if full[0] and Path(target).name == "step-00000001":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    model, optimizer = optimised(1)
    checkpointer = Checkpointer(tmp_path, CheckpointSettings(asynchronous=True), ALONE)
    checkpointer.save(RunState(1, {}, identity()), model, optimizer)  # the thread fails
    words = r"\[Errno 28\] No space left on device: '.*/step-00000001'"
    with pytest.raises(OSError, match=words):
        checkpointer.save(RunState(2, {}, identity()), model, optimizer)
    assert not list(tmp_path.iterdir())
    checkpointer.save(RunState(2, {}, identity()), model, optimizer)  # told once
    checkpointer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    with pytest.raises(OSError, match=words):  # also when nothing is saved after it
        tiny_run(tmp_path / "run", tiny_settings(steps=1, asynchronous=True))


def test_what_is_being_written_when_a_run_fails_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go on behind the back of whoever trains in the folder next."""
    rename, began = os.rename, threading.Event()

    def slow(source: Path, target: Path) -> None:
        began.set()
        time.sleep(0.2)
        rename(source, target)

    def fail(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            assert began.wait(timeout=120)
            raise RuntimeError("of the one who watches")

    monkeypatch.setattr(os, "rename", slow)
    with pytest.raises(RuntimeError, match="who watches"):
        tiny_run(tmp_path, tiny_settings(asynchronous=True), on_record=fail)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}


# How many are kept


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


def test_milestones_are_kept(tmp_path: Path) -> None:
    settings = tiny_settings(every=2, keep_last=1, milestone_every=4)
    tiny_run(tmp_path, settings, on_record=stop_at(7))
    assert steps_kept(tmp_path) == [4, 7]
    tiny_run(tmp_path, settings)
    assert steps_kept(tmp_path) == [4, 8, 10]
    tiny_run(tmp_path, tiny_settings(every=2, keep_last=1))
    assert steps_kept(tmp_path) == [10]  # nobody asks for them any more


def steps_kept(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(directory / "checkpoints")]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_loop_keeps_so_many(tmp_path: Path, keep: int) -> None:
    tiny_run(tmp_path, tiny_settings(every=2, keep_last=keep))
    assert steps_kept(tmp_path) == [2, 4, 6, 8, 10][-keep:]


def test_fewer_are_kept_when_one_goes_on_with_less(tmp_path: Path) -> None:
    tiny_run(tmp_path, tiny_settings(every=2, keep_last=5), on_record=stop_at(7))
    assert len(checkpoints(tmp_path / "checkpoints")) == 4
    tiny_run(tmp_path, tiny_settings(every=100, keep_last=1), on_record=stop_at(8))
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000008"]


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    whole = save(tmp_path, 5)
    for name in ("step-00000009.tmp", "step-00000009.old-ab", "step-9.deleted", "step-x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    assert checkpoints(tmp_path) == [whole]
    assert checkpoints(tmp_path / "missing") == []


def test_remains_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = {"step-00000009.old", "notes.tmp"}  # which are not ours
    for name in ("step-00000009.tmp", "step-00000002.deleted", *kept):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").touch()
    tiny_run(tmp_path, tiny_settings(steps=1))
    assert {path.name for path in folder.iterdir()} == {*kept, "step-00000001"}


def test_one_run_a_folder(tmp_path: Path) -> None:
    with only_run(tmp_path / "new", ALONE):
        with pytest.raises(ValueError, match=r"new: another process is training there"):
            only_run(tmp_path / "new", ALONE).__enter__()
        with only_run(tmp_path / "other", ALONE):
            pass
    with only_run(tmp_path / "new", ALONE):
        pass


# Damage


def load(path: Path) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = adamw(model, SETTINGS.optim)
    try:
        load_state(path, model, optimizer, identity(), ALONE)
    finally:  # refused before anything was changed
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not optimizer.state_dict()["state"]


def refused(path: Path, words: str = "") -> None:
    named = f"^{re.escape(str(path))}: damaged checkpoint \\(.*{re.escape(words)}.*; delete it to resume"
    with pytest.raises(ValueError, match=named) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS, "state.json"])
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
    refused(path, name if how == "missing" or name == WEIGHTS else "")


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_one_flipped_bit(flippable: tuple[Path, bytes], place: float, bit: int) -> None:
    """Of a weight, of the header, of padding: whatever it is, it is not what was written."""
    path, content = flippable
    changed = bytearray(content)
    changed[int(place * len(content))] ^= 1 << bit
    (path / WEIGHTS).write_bytes(changed)
    refused(path, f"{WEIGHTS} is not what was written (its sha256 differs)")


@pytest.fixture(scope="module")
def flippable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = save(tmp_path_factory.mktemp("flipped"), 5)
    return path, (path / WEIGHTS).read_bytes()


def test_every_flipped_bit_of_the_state(tmp_path: Path) -> None:
    """A step, a loss or a place in the data with another digit is as good a number as the right one."""
    path = save(tmp_path, 5)
    content = (path / "state.json").read_bytes()
    written = json.loads(content)
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (path / "state.json").write_bytes(changed)
            try:
                values = json.loads(changed)
            except ValueError:
                values = None  # refused as no JSON
            if values != written:
                with pytest.raises(ValueError, match="damaged checkpoint"):
                    read_state(path)


@pytest.mark.parametrize("what", ["extra", "nothing", "a path", "a list"])
def test_other_files_than_the_state_names(tmp_path: Path, what: str) -> None:
    path = save(tmp_path, 5)
    values = json.loads((path / "state.json").read_text())
    if what == "extra":
        (path / "shard-00002.safetensors").write_bytes((path / WEIGHTS).read_bytes())
    files = {"nothing": {}, "a path": {f"../{path.name}/{WEIGHTS}": "0"}, "a list": [WEIGHTS]}
    values["files"] = files.get(what, values["files"])
    (path / "state.json").write_text(json.dumps(values))
    refused(path, "shard-00002.safetensors" if what == "extra" else "files in state.json")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "5"},
        {"step": None},
        {"loader": [1]},
        {"identity": "text"},
        {"more": 1},
        {"losses": "text"},
        {"losses": [1.5, None]},
        {"losses": [math.nan]},
        {"losses": {"1": 1.5}},
    ],
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


@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize("how", ["renamed", "extra", "misshaped", "missing"])
def test_other_tensors(tmp_path: Path, kind: str, how: str) -> None:
    """With sums that are right: of another version of this program, say."""
    path = save(tmp_path, 5)
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if name.startswith(kind) and tensor.ndim == 2)
    if how == "misshaped":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensor = tensors[name].clone() if how == "extra" else tensors.pop(name)
        if how != "missing":
            tensors[f"{kind}.other.exp_avg"] = tensor
    safetensors.torch.save_file(tensors, path / WEIGHTS)
    state, _ = read_state(path)
    write_state(path, state, {WEIGHTS: hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()})
    words = {"missing": "it lacks", "misshaped": name.removeprefix("model.")}
    refused(path, words.get(how, ""))


def test_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    """As the message says."""
    tiny_run(tmp_path, on_record=stop_at(8))
    older, newest = checkpoints(tmp_path / "checkpoints")
    (newest / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{re.escape(str(newest))}: damaged .*resume from the one before"):
        tiny_run(tmp_path)
    shutil.rmtree(newest)
    assert older.name == "step-00000006"
    second = tiny_run(tmp_path)
    whole = tiny_run(tmp_path / "other")
    assert second.losses == whole.losses[6:]
    assert same_weights(second.model, whole.model)


def test_what_one_process_cannot_write_is_not_removed_under_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was still reading a file of its own leaves it to the other to say why."""
    temporary, said, barrier = tmp_path / "step-00000001.tmp", [None, None], threading.Barrier(2, timeout=20)
    temporary.mkdir()
    for rank in (0, 1):
        (temporary / f"shard-{rank}").write_bytes(b"numbers")
    found: list[Any] = [None, None]

    class Meeting(World):
        def gather(self, value: Any) -> list[Any]:
            said[self.rank] = value
            barrier.wait()
            return [*said]

    def hashed(file: Path) -> str:
        if file.name == "shard-1":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.1)
        return file_sha256(file)

    def publish(rank: int) -> None:
        checkpointer = Checkpointer(tmp_path, CheckpointSettings(), Meeting(rank, 2))
        try:
            with _plain_errors(tmp_path / "step-00000001", temporary):
                checkpointer._publish(temporary, tmp_path / "step-00000001", RunState(1, {}, identity()))
        except Exception as error:
            found[rank] = error

    monkeypatch.setattr(mobilellm.train.state, "file_sha256", hashed)
    threads = [threading.Thread(target=publish, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert str(found[1]) == f"[Errno 28] No space left on device: '{tmp_path}/step-00000001'"
    assert type(found[0]) is ToldByAnother
    assert not temporary.exists()


def test_a_checkpoint_of_another_run_names_what_differs(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    other = replace(LS, rope_theta=5000.0)
    theirs = run_identity(tiny_model(other), tiny_settings(weight_decay=0.0))
    with pytest.raises(ValueError) as caught:
        load_state(path, *optimised(2), theirs, ALONE)
    assert str(caught.value) == (
        f"{path}: belongs to a run with other settings (optim.weight_decay = 0.1, not 0.0; "
        "rope_theta = 10000.0, not 5000.0); use another folder or the same settings"
    )


def test_every_setting_that_changes_the_outcome_is_part_of_the_identity() -> None:
    habits = {
        "evaluate_every", "batch.micro_batch", "compute.compile", "compute.strategy",
        "compute.activation_checkpointing", "checkpoint.every", "checkpoint.keep_last",
        "checkpoint.milestone_every", "checkpoint.asynchronous", "guard.spike_factor", "guard.window",
    }  # fmt: skip
    expected = LS.to_dict() | {leaf: value_of(leaf) for leaf in leaves(TrainSettings) if leaf not in habits}
    assert identity() == expected
    json.dumps(identity())


def value_of(leaf: str) -> Any:
    section, _, name = leaf.rpartition(".")
    return getattr(getattr(SETTINGS, section) if section else SETTINGS, name)


def test_the_loader_s_state_is_json() -> None:
    state = tiny_loader(SETTINGS).state()
    assert json.loads(json.dumps(state)) == state
