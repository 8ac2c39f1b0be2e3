"""The loop: resumption to the bit whatever stopped it, sums that do not depend on micro-batches, clear stops."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_runs import (
    KILLED,
    LS,
    Run,
    Runner,
    an_evaluation,
    dropping_loss,
    half_written,
    killed_run,
    leaves,
    newest_step,
    same_weights,
    stop_at,
    timeless,
    tiny_loader,
    tiny_model,
    tiny_run,
    tiny_settings,
    tiny_stream,
    wait_for_step,
)
from torch import Tensor

from mobilellm.cli.main import one_line
from mobilellm.data.loader import Batch, PackedLoader
from mobilellm.model.transformer import Block, MobileLLM
from mobilellm.tokenizer import BOS_ID
from mobilellm.train import state
from mobilellm.train.checkpoint_files import checkpoints
from mobilellm.train.guard import TrainingError
from mobilellm.train.loop import train
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import Record, read_metrics
from mobilellm.train.settings import BatchSettings, ScheduleSettings, TrainSettings
from mobilellm.train.state import load_weights

# What a run records


def test_every_step_is_recorded(tmp_path: Path) -> None:
    settings = tiny_settings()
    run = tiny_run(tmp_path, settings, evaluate=an_evaluation)
    assert run.done == 10
    assert read_metrics(tmp_path / "metrics.jsonl") == run.records
    steps = [record for record in run.records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert [record["tokens"] for record in steps] == [64 * step for step in range(1, 11)]
    assert [record["learning_rate"] for record in steps[:3]] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3)
    assert all(record["seconds"] > record["data_seconds"] >= 0 for record in steps)
    assert all(record["gradient_norm"] > 0 and record["peak_memory_bytes"] > 10**7 for record in steps)
    assert [record["step"] for record in run.records if "eval" in record] == [0, 4, 8, 10]
    for record in run.records:
        if "eval" in record:
            assert record["eval"]["step"] == record["step"]  # the evaluator is told the step
    assert run.records[0]["eval"] == an_evaluation(tiny_model(), 0)  # before any step
    assert run.records[-1]["eval"] == an_evaluation(run.model, 10)  # the last, due or not


def test_it_learns(tmp_path: Path) -> None:
    losses = tiny_run(tmp_path, tiny_settings(steps=80, warmup_steps=10, every=50)).losses
    assert losses[0] > 5.5
    assert min(losses[-10:]) < 3.5  # a quarter of the tokens cannot be known


def test_evaluators_may_give_any_number(tmp_path: Path) -> None:
    def evaluate(model: MobileLLM, step: int) -> dict[str, Any]:
        return {"numpy": np.float32(0.5), "tensor": torch.tensor(2.0), "whole": 3}

    run = tiny_run(tmp_path, tiny_settings(steps=1), evaluate=evaluate)
    assert read_metrics(tmp_path / "metrics.jsonl") == run.records
    assert run.records[-1]["eval"] == {"numpy": 0.5, "tensor": 2.0, "whole": 3.0}


def test_a_run_that_is_complete_is_left_alone(tmp_path: Path) -> None:
    first = tiny_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = tiny_run(tmp_path, evaluate=an_evaluation)
    assert (again.done, again.records) == (10, [])
    assert same_weights(first.model, again.model)  # as loaded
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_fresh_start_leaves_no_old_records(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint begins again: no step may stand there twice."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval": {}}\n{"step": 1, "loss": 9}\n{"st')
    run = tiny_run(tmp_path, tiny_settings(steps=2), evaluate=an_evaluation)
    assert read_metrics(tmp_path / "metrics.jsonl") == run.records
    assert [record["step"] for record in run.records] == [0, 1, 2, 2]


# Stopping and going on


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`tiny_run` as it is."""
    torch.set_num_threads(1)
    return tiny_run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("uninterrupted")
    return tiny_run(directory, evaluate=an_evaluation, loss_function=dropping_loss)


@pytest.mark.parametrize("step", range(1, 10))
def test_stopped_and_resumed_is_the_same_run(tmp_path: Path, uninterrupted: Run, step: int) -> None:
    """Losses, evaluations, weights: equal to the bit, though the loss draws random numbers."""
    arguments: dict[str, Any] = {"evaluate": an_evaluation, "loss_function": dropping_loss}
    first = tiny_run(
        tmp_path,
        on_record=stop_at(step, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[step % 3]),
        **arguments,
    )
    assert first.done == step == newest_step(tmp_path)
    assert first.stopped == ("interrupt" if step % 3 == 0 else "requeue")
    torch.rand(step)  # another process would be in another random state
    second = tiny_run(tmp_path, **arguments)
    assert (second.done, second.stopped) == (10, None)
    assert timeless(first.records + second.records) == timeless(uninterrupted.records)
    assert timeless(read_metrics(tmp_path / "metrics.jsonl")) == timeless(uninterrupted.records)
    assert same_weights(second.model, uninterrupted.model)


@pytest.mark.parametrize(
    "changes",
    [{"optim.name": "muon"}, {"precision": "bfloat16"}, {"asynchronous": True}, {"schedule.name": "wsd"}],
    ids=str,
)
def test_other_arithmetic_resumes_exactly_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = tiny_settings(**changes)
    whole = tiny_run(tmp_path / "whole", settings)
    first = tiny_run(tmp_path / "parts", settings, on_record=stop_at(5))
    second = tiny_run(tmp_path / "parts", settings)
    assert first.losses + second.losses == whole.losses
    assert same_weights(second.model, whole.model)


def test_stopped_at_every_single_step(tmp_path: Path, uninterrupted: Run) -> None:
    for step in range(1, 11):
        run = tiny_run(tmp_path, on_record=stop_at(step), evaluate=an_evaluation, loss_function=dropping_loss)
        assert run.done == step
    assert same_weights(run.model, uninterrupted.model)
    assert timeless(read_metrics(tmp_path / "metrics.jsonl")) == timeless(uninterrupted.records)


def test_a_stop_during_the_first_evaluation(tmp_path: Path) -> None:
    def evaluate(model: MobileLLM, step: int) -> dict[str, float]:
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    assert tiny_run(tmp_path, evaluate=evaluate).done == 0
    assert not checkpoints(tmp_path / "checkpoints")
    run = tiny_run(tmp_path, tiny_settings(steps=2), evaluate=an_evaluation)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 2]
    assert run.done == 2


def test_a_second_signal_interrupts_at_once(tmp_path: Path, plain: Run) -> None:
    calls = 0

    def impatient(model: MobileLLM, *batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
            assert weighted_loss(model, *batch) > 0  # the first only asks
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal was not heeded")
        return weighted_loss(model, *batch)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, loss_function=impatient)
    assert [signal.getsignal(number) for number in numbers] == before
    assert newest_step(tmp_path) == 3
    assert same_weights(tiny_run(tmp_path).model, plain.model)


def test_the_same_signal_may_come_twice(tmp_path: Path) -> None:
    """From the scheduler and, passed on, from the launcher: the checkpoint must still be written."""

    def loss(model: MobileLLM, *batch: Tensor) -> Tensor:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return weighted_loss(model, *batch)

    said = list[str]()
    run = tiny_run(tmp_path, loss_function=loss, on_stop=lambda: said.append("stopping"))
    assert (run.done, run.stopped, newest_step(tmp_path)) == (1, "requeue", 1)
    assert said == ["stopping"]


def test_a_failure_tells_of_a_checkpoint_that_failed_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which was written in the background, and of which nobody else would hear."""

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def spoilt(record: Record) -> None:
        if record["step"] == 4:
            raise ValueError("the data ends here")

    monkeypatch.setattr(state, "file_sha256", full)
    with pytest.raises(ValueError, match="the data ends here") as caught:
        tiny_run(tmp_path, tiny_settings(asynchronous=True), on_record=spoilt)
    (note,) = caught.value.__notes__
    assert note.startswith("the last checkpoint was not written, either ([Errno 28] No space left on device")
    assert one_line(caught.value, "train") == f"the data ends here; {note}"


def test_a_stop_while_loading_is_heeded_after_it(tmp_path: Path) -> None:
    """An interrupt inside the libraries that read a checkpoint would look like damage."""
    tiny_run(tmp_path, on_record=stop_at(4))

    class Impatient(PackedLoader):
        def restore(self, state: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().restore(state)

    before, settings = (tmp_path / "metrics.jsonl").read_bytes(), tiny_settings()
    loader = Impatient(tiny_stream(), 16, 4, settings.seed)
    assert train(tiny_model(), loader, settings, tmp_path) == (4, "interrupt")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_an_interrupt_that_a_library_swallows_is_still_one(tmp_path: Path) -> None:
    def swallowing(model: MobileLLM, *batch: Tensor) -> Tensor:
        try:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("damaged") from None
        raise AssertionError("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, loss_function=swallowing)


def test_trains_where_signals_cannot_be_caught(tmp_path: Path) -> None:
    done = []
    thread = threading.Thread(target=lambda: done.append(tiny_run(tmp_path, tiny_settings(steps=2)).done))
    thread.start()
    thread.join(timeout=300)
    assert done == [2]


def test_smaller_micro_batches_may_go_on_with_it(tmp_path: Path, plain: Run) -> None:
    """On a smaller machine, say; so may other habits of saving and evaluating."""
    first = tiny_run(tmp_path, on_record=stop_at(5))
    habits = tiny_settings(
        micro_batch=1, every=1, evaluate_every=1, keep_last=5, asynchronous=True, spike_factor=50.0
    )
    second = tiny_run(tmp_path, habits)
    assert first.losses + second.losses == pytest.approx(plain.losses, rel=1e-5)


# Killed, in a process of its own


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("unkilled")
    assert killed_run(directory) == KILLED.steps
    return directory


WEIGHTS = "shard-00001-model-00001-of-00001.safetensors"


def assert_same_run(directory: Path, other: Path) -> None:
    """Every record once and in order, and the last checkpoint's weights and optimiser to the byte."""
    ours, theirs = (timeless(read_metrics(path / "metrics.jsonl")) for path in (directory, other))
    assert ours == theirs
    newest = [checkpoints(path / "checkpoints")[-1] for path in (directory, other)]
    assert same_checkpoint(*newest)
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert set((directory / "checkpoints").iterdir()) == set(checkpoints(directory / "checkpoints")[-2:])


def same_checkpoint(a: Path, b: Path) -> bool:
    """The same state and the same bits of the same tensors. (A safetensors file begins with an unsorted map.)"""
    states = [json.loads((path / "state.json").read_text()) for path in (a, b)]
    assert [len(state.pop("sha256")) for state in states] == [64, 64]  # over those of the files, too
    assert [list(state.pop("files")) for state in states] == [[WEIGHTS], [WEIGHTS]]
    ours, theirs = (safetensors.torch.load_file(path / WEIGHTS) for path in (a, b))
    assert ours.keys() == theirs.keys()
    return states[0] == states[1] and all(torch.equal(ours[name], theirs[name]) for name in ours)


IN_BACKGROUND = pytest.mark.parametrize("asynchronous", [False, True], ids=["", "in the background"])


@pytest.mark.slow
@IN_BACKGROUND
def test_killed_at_every_file_it_touches(
    tmp_path: Path, runner: Runner, unkilled: Path, asynchronous: bool
) -> None:
    """kill -9 just before the n-th time it opens, renames or removes a file, for n = 2, 3, 4, …"""
    directory, code, events = tmp_path / "run", -signal.SIGKILL, 1
    while code == -signal.SIGKILL:
        events += 1
        code, text = runner.run(directory, kill_at=events, asynchronous=asynchronous)
    assert (code, text) == (0, f"done {KILLED.steps}")
    assert events > 15
    assert_same_run(directory, unkilled)


# Of the first save, and of all that a save which drops an old one leaves on its way; the slow test takes every file.
@pytest.mark.parametrize("events", [12, 31, 34, 36, 38, 39, 41, 42])
def test_killed_once_while_saving(tmp_path: Path, runner: Runner, unkilled: Path, events: int) -> None:
    directory = tmp_path / "run"
    assert runner.run(directory, kill_at=events) == (-signal.SIGKILL, "")
    for path in checkpoints(directory / "checkpoints"):  # whatever has the name of one is whole
        assert sorted(item.name for item in path.iterdir()) == [WEIGHTS, "state.json"]
        load_weights(path, tiny_model())
    assert runner.run(directory) == (0, f"done {KILLED.steps}")
    assert_same_run(directory, unkilled)


@IN_BACKGROUND
def test_killed_at_ten_random_moments(
    tmp_path: Path, runner: Runner, unkilled: Path, asynchronous: bool
) -> None:
    """kill -9; every second time as soon as a checkpoint is being written, or a little later."""
    chance, kills, while_saving, attempt = random.Random(20), 0, 0, 0
    while kills < 10:
        attempt += 1
        directory = tmp_path / f"{attempt}"
        while newest_step(directory) < KILLED.steps:
            pid = runner.start(directory, asynchronous=asynchronous)
            deadline = time.monotonic() + chance.uniform(0.01, 0.5)
            while kills % 2 and time.monotonic() < deadline + 30 and not half_written(directory):
                if newest_step(directory) == KILLED.steps:
                    break
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.01) if kills % 2 else max(0, deadline - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
            code, text = runner.finish()
            assert code in (0, -signal.SIGKILL), text
            kills += code != 0
            while_saving += half_written(directory)
        runner.run(directory)  # what was killed just after its last checkpoint leaves a little to clear up
        assert_same_run(directory, unkilled)
    assert while_saving >= 1, kills


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stopped_at_random_moments(tmp_path: Path, runner: Runner, unkilled: Path, number: int) -> None:
    chance, stops = random.Random(number), 0
    for attempt in range(3):
        directory, patience = tmp_path / f"{attempt}", 0.1
        while newest_step(directory) < KILLED.steps:
            pid = runner.start(directory)
            time.sleep(chance.uniform(0.01, patience))
            patience *= 1.5  # a busy machine may need longer to get to its next checkpoint
            os.kill(pid, number)
            code, text = runner.finish()
            assert code in (0, 130, -number), text
            stops += newest_step(directory) < KILLED.steps
            logged = read_metrics(directory / "metrics.jsonl")
            if code == 0:  # it was asked to stop, and did so with a checkpoint of all that it had done
                assert text == f"done {newest_step(directory)}"
                assert newest_step(directory) == (logged[-1]["step"] if logged else 0)
        runner.run(directory)
        assert_same_run(directory, unkilled)
    assert stops > 0


def test_records_reach_the_disk_before_the_checkpoint_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could leave a checkpoint whose steps are not in the log."""
    synced, sync, rename = [0], os.fsync, os.rename
    log = tmp_path / "metrics.jsonl"

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        if log.exists() and os.path.samestat(os.fstat(descriptor), log.stat()):
            synced.append(len(read_metrics(log)))

    def watched_rename(source: Path, target: Path) -> None:
        if (match := re.fullmatch(r"step-0*(\d+)", Path(target).name)) and Path(source).suffix == ".tmp":
            assert synced[-1] == int(match[1])
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "rename", watched_rename)
    tiny_run(tmp_path)
    assert synced[-4:] == [3, 6, 9, 10]


def test_an_ignored_signal_stays_ignored(tmp_path: Path, runner: Runner) -> None:
    """A shell starts background jobs so: a Ctrl-C is not meant for them."""
    pid = runner.start(tmp_path / "run", ignore=signal.SIGINT, wait_at=2)
    wait_for_step(tmp_path / "run", 2)
    os.kill(pid, signal.SIGINT)
    (tmp_path / "go").touch()
    assert runner.finish() == (0, f"done {KILLED.steps}")


def test_one_process_a_folder(tmp_path: Path, runner: Runner) -> None:
    runner.start(tmp_path / "run", wait_at=1)
    wait_for_step(tmp_path / "run", 1)
    with pytest.raises(ValueError, match="another process is training there; wait for it or use another"):
        tiny_run(tmp_path / "run", KILLED)
    (tmp_path / "go").touch()
    assert runner.finish() == (0, f"done {KILLED.steps}")


def test_a_full_disk_while_saving(tmp_path: Path, runner: Runner, unkilled: Path) -> None:
    directory = tmp_path / "run"
    code, text = runner.run(directory, file_size=100_000)  # less than the weights
    assert code == 0
    assert text == f"OSError: [Errno 27] File too large: '{directory}/checkpoints/step-00000002'"
    assert not list((directory / "checkpoints").iterdir())
    runner.run(directory, kill_at=60)
    before = newest_step(directory)
    assert 0 < before < KILLED.steps
    code, text = runner.run(directory, file_size=600_000)  # the weights fit, the moments do not
    assert text.startswith("OSError: [Errno 27] File too large: ")
    assert newest_step(directory) == before
    assert runner.run(directory) == (0, f"done {KILLED.steps}")
    assert_same_run(directory, unkilled)


# Refusals


def test_refuses_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    tiny_run(tmp_path, on_record=stop_at(6))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    newest = re.escape(str(checkpoints(tmp_path / "checkpoints")[-1]))
    for changes, words in (
        ({"lr": 2e-2}, "optim.lr = 0.01, not 0.02"),
        ({"steps": 11}, "steps = 10, not 11"),
        ({"seed": 6, "beta1": 0.8}, "optim.beta1 = 0.9, not 0.8; seed = 5, not 6"),
    ):
        with pytest.raises(ValueError, match=f"{newest}: belongs to a run with other settings .*{words}"):
            tiny_run(tmp_path, tiny_settings(**changes))
    with pytest.raises(ValueError, match=f"{newest}: .*repeats = 2, not 3"):
        tiny_run(tmp_path, config=replace(LS, repeats=3))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert tiny_run(tmp_path).done == 10


def test_a_run_at_its_peak_is_made_longer_or_shorter(tmp_path: Path) -> None:
    """Bit for bit the run it would have been from the start; in the decay that can no longer be."""

    def scheduled(steps: int, **schedule: float) -> TrainSettings:
        return replace(
            tiny_settings(steps=steps),
            schedule=ScheduleSettings(name="wsd", warmup_steps=2, decay_fraction=0.3, **schedule),
        )

    for number, others in enumerate((scheduled(20), scheduled(8), scheduled(10, final_fraction=0.5))):
        whole, run = tmp_path / f"whole {number}", tmp_path / f"run {number}"
        tiny_run(whole, others)
        tiny_run(run, scheduled(10), on_record=stop_at(4))
        assert tiny_run(run, others).done == others.steps
        assert_same_run(run, whole)
    tiny_run(tmp_path / "decaying", scheduled(10), on_record=stop_at(8))
    with pytest.raises(ValueError, match="steps = 10, not 20"):
        tiny_run(tmp_path / "decaying", scheduled(20))
    tiny_run(tmp_path / "further", scheduled(20), on_record=stop_at(8))
    with pytest.raises(ValueError, match="steps = 20, not 4"):
        tiny_run(tmp_path / "further", scheduled(4))


def test_refuses_other_data(tmp_path: Path) -> None:
    settings = tiny_settings()
    tiny_run(tmp_path, settings, on_record=stop_at(3))
    other = PackedLoader(tiny_stream(700), 16, 4, settings.seed)
    with pytest.raises(
        ValueError, match=r"resume: the loader has tokens = \[700\] and the checkpoint \[600\]"
    ):
        train(tiny_model(), other, settings, tmp_path)


@pytest.mark.parametrize("changes", [{"tokens_per_step": 128}, {"sequence_length": 8}])
def test_refuses_settings_that_do_not_fit_the_loader(tmp_path: Path, changes: dict[str, int]) -> None:
    settings = tiny_settings(**changes)
    with pytest.raises(ValueError, match=r"the loader gives batches of \(4, 16\), the settings"):
        train(tiny_model(), tiny_loader(tiny_settings()), settings, tmp_path)


def test_refuses_sequences_longer_than_the_context(tmp_path: Path) -> None:
    settings = tiny_settings(sequence_length=129, tokens_per_step=516)
    with pytest.raises(ValueError, match=r"sequence_length = 129 is longer than the model's context of 128"):
        tiny_run(tmp_path, settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops(tmp_path: Path, plain: Run, bad: str) -> None:
    """Before the weights are touched; with the address of the batch; the last checkpoint stays good."""
    calls, spoilt = 0, 7

    def spoiling(model: MobileLLM, *batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = weighted_loss(model, *batch)
        if calls != spoilt:
            return loss
        if bad == "loss":
            return loss * float("nan")
        zero = model.head_weight.sum() * 0
        return loss + (zero * zero).sqrt()  # 0, with the gradient 0 / 0

    model, settings = tiny_model(), tiny_settings()
    loader = tiny_loader(settings)
    with pytest.raises(TrainingError) as caught:
        train(model, loader, settings, tmp_path, loss_function=spoiling)
    message = str(caught.value)
    assert message.startswith(f"step 7: loss {'nan' if bad == 'loss' else '6.'}")
    assert f"address is in {tmp_path / 'bad-batch.json'}" in message
    assert "optim.lr below 0.01" in message
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert newest_step(tmp_path) == 6
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    told = json.loads((tmp_path / "bad-batch.json").read_text())
    assert told["step"] == 7
    assert told["loss" if bad == "loss" else "gradient_norm"] == "nan"
    address = told["batch"]
    assert address["windows"] == [24]  # six steps of four windows came before
    again = tiny_loader(settings)
    again.restore(address)
    used = tiny_loader(settings)
    for _ in range(6):
        used.next()
    assert np.array_equal(again.next().tokens, used.next().tokens)  # the batch can be looked at
    assert same_weights(tiny_run(tmp_path).model, plain.model)  # and the run goes on


class WeightedLoader(PackedLoader):
    """Unequal weights, whole rows at 0 among them."""

    factor = 1.0

    def next(self) -> Batch:
        tokens, targets, weights, *_ = super().next()
        rows = np.array([[0.0], [1.0], [3.0], [0.25]], dtype=np.float32)
        return Batch(tokens, targets, np.where(tokens % 3 == 0, 0, weights * rows) * np.float32(self.factor))


def weighted_losses(directory: Path, micro_batch: int) -> tuple[list[float], MobileLLM]:
    settings, model, records = tiny_settings(micro_batch=micro_batch), tiny_model(), list[Record]()
    loader = WeightedLoader(tiny_stream(), 16, 4, settings.seed)
    train(model, loader, settings, directory, on_record=records.append)
    return [record["loss"] for record in records], model


def test_micro_batches_change_nothing(tmp_path: Path, plain: Run) -> None:
    weighted, _ = weighted_losses(tmp_path / "weighted", 4)
    for micro_batch in (1, 2, 3, 100):
        parts = tiny_run(tmp_path / f"{micro_batch}", tiny_settings(micro_batch=micro_batch))
        assert parts.losses == pytest.approx(plain.losses, rel=1e-6)
        assert weighted_losses(tmp_path / f"weighted {micro_batch}", micro_batch)[0] == pytest.approx(
            weighted, rel=1e-6
        )


def test_weights_count_by_token(tmp_path: Path) -> None:
    """The first loss is the weighted mean over the whole batch, here written out."""
    settings = tiny_settings()
    tokens, targets, weights, *_ = WeightedLoader(tiny_stream(), 16, 4, settings.seed).next()
    logits = tiny_model()(torch.from_numpy(tokens)).double().log_softmax(-1).detach().numpy()
    sums = [
        (weights[row, i] * -logits[row, i, targets[row, i]], weights[row, i])
        for row in range(4)
        for i in range(16)
    ]
    mean = sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)
    assert weighted_losses(tmp_path, 1)[0][0] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_real_loss_takes_what_the_loop_tells_it(tmp_path: Path, precision: str) -> None:
    plain = tiny_run(tmp_path / "plain", tiny_settings(precision=precision))
    again = tiny_run(tmp_path / "again", tiny_settings(precision=precision, activation_checkpointing=True))
    assert again.losses == pytest.approx(plain.losses, rel=1e-5)
    kept = tiny_run(tmp_path / "kept", tiny_settings(precision=precision, z_loss=1e-2))
    assert kept.losses[0] > plain.losses[0] + 0.1  # log(384) squared is 35


def test_the_loss_is_told_the_segments(tmp_path: Path) -> None:
    """Of its own micro-batch, where documents are kept apart; nothing where they are not."""
    stream, settings = tiny_stream(), tiny_settings(steps=3, micro_batch=2)
    stream[::9] = BOS_ID
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(model: MobileLLM, tokens: Tensor, targets: Tensor, weights: Tensor, segments: Tensor) -> Tensor:
        seen.append((tokens, segments))
        return weighted_loss(model, tokens, targets, weights)

    loader = PackedLoader(stream, 16, 4, settings.seed, document_mask=True)
    train(tiny_model(), loader, settings, tmp_path, loss_function=loss)
    again = PackedLoader(stream, 16, 4, settings.seed, document_mask=True)
    for number in range(3):
        batch, parts = again.next(), seen[2 * number : 2 * number + 2]
        assert np.array_equal(torch.cat([tokens for tokens, _ in parts]), batch.tokens)
        assert np.array_equal(torch.cat([segments for _, segments in parts]), batch.segments)
    assert len(seen) == 6


def test_a_batch_in_which_nothing_counts(tmp_path: Path) -> None:
    settings = tiny_settings()
    loader = WeightedLoader(tiny_stream(), 16, 4, settings.seed)
    loader.factor = 0.0
    with pytest.raises(TrainingError, match=r"step 1: no target of the batch counts .*'windows': \[0\]"):
        train(tiny_model(), loader, settings, tmp_path)


# Every field of the settings does something


def outcome(directory: Path, settings: TrainSettings) -> dict[str, Any]:
    """What can be seen of a run."""
    shapes, told = [], []

    def loss(model: MobileLLM, tokens: Tensor, targets: Tensor, weights: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(tokens.shape))
        told.append(options)  # which are the loss's own business, and tested there
        jump = 3.0 if len(shapes) == 12 else 1.0
        return jump * dropping_loss(model, tokens, targets, weights)

    saving = []

    class Watched(threading.Thread):
        def start(self) -> None:
            saving.append(self.name)
            super().start()

    stopped_by = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "Thread", Watched)
        try:
            tiny_run(directory, settings, evaluate=an_evaluation, loss_function=loss)
        except TrainingError as error:
            stopped_by = str(error)
    kept = [path.name for path in checkpoints(directory / "checkpoints")]
    records = read_metrics(directory / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    shutil.rmtree(directory)
    return {
        "shapes": shapes,
        "told": told,
        "losses": [record["loss"] for record in steps],
        "rates": [record["learning_rate"] for record in steps],
        "tokens": [record["tokens"] for record in steps],
        "evaluated": [record["step"] for record in records if "eval" in record],
        "kept": kept,
        "saving": [name for name in saving if name == "checkpoint"],
        "stopped": stopped_by,
    }


SMALL: dict[str, Any] = {
    "steps": 6, "schedule.warmup_steps": 2, "checkpoint.keep_last": 3, "checkpoint.every": 2,
    "evaluate_every": 2,
}  # fmt: skip
EFFECTS: dict[str, tuple[dict[str, Any], Any, str]] = {  # leaf: beside what, another value, where it shows
    "steps": ({}, 5, "rates"),
    "seed": ({}, 6, "losses"),
    "evaluate_every": ({}, 3, "evaluated"),
    "batch.tokens_per_step": ({}, 128, "tokens"),
    "batch.sequence_length": ({}, 8, "shapes"),
    "batch.micro_batch": ({}, 2, "shapes"),
    "optim.name": ({}, "muon", "losses"),
    "optim.lr": ({}, 2e-2, "losses"),
    "optim.beta1": ({}, 0.8, "losses"),
    "optim.beta2": ({}, 0.5, "losses"),
    "optim.epsilon": ({}, 1e-2, "losses"),
    "optim.weight_decay": ({}, 5.0, "losses"),
    "optim.clip_norm": ({}, 1e-6, "losses"),
    "schedule.name": ({}, "linear", "rates"),
    "schedule.warmup_steps": ({}, 3, "rates"),
    "schedule.final_fraction": ({}, 0.5, "rates"),
    "schedule.decay_fraction": ({"schedule.name": "wsd"}, 0.5, "rates"),
    "compute.precision": ({}, "bfloat16", "losses"),
    "compute.z_loss": ({}, 1e-4, "told"),
    "compute.activation_checkpointing": ({}, True, "told"),
    "checkpoint.every": ({}, 3, "kept"),
    "checkpoint.keep_last": ({}, 1, "kept"),
    "checkpoint.milestone_every": ({"checkpoint.keep_last": 1}, 2, "kept"),
    "checkpoint.asynchronous": ({}, True, "saving"),
    "guard.spike_factor": ({"steps": 14}, 2.0, "stopped"),
    "guard.window": ({"steps": 14, "guard.spike_factor": 2.0}, 3, "stopped"),
}
ELSEWHERE = {
    "compute.compile": "test_compiled_blocks_learn_the_same",
    "compute.strategy": "test_distributed.py: of one process there is nothing to spread",
}
HABITS = {  # which may change in the middle of a run
    "evaluate_every", "checkpoint.every", "checkpoint.keep_last", "checkpoint.milestone_every",
    "checkpoint.asynchronous",
}  # fmt: skip


def test_every_leaf_is_listed() -> None:
    assert EFFECTS.keys() | ELSEWHERE.keys() == set(leaves(TrainSettings))
    assert not EFFECTS.keys() & ELSEWHERE.keys()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The outcome of SMALL beside some changes, computed once."""
    torch.set_num_threads(1)

    @functools.cache
    def cached(changes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        settings = tiny_settings(**{**SMALL, **dict(changes)})
        return outcome(tmp_path_factory.mktemp("base"), settings)

    return lambda changes: cached(tuple(changes.items()))


@pytest.mark.parametrize("leaf", EFFECTS)
def test_every_leaf_has_an_effect(
    tmp_path: Path, base: Callable[[dict[str, Any]], dict[str, Any]], leaf: str
) -> None:
    beside, other, shows = EFFECTS[leaf]
    before = base(beside)
    after = outcome(tmp_path / "run", tiny_settings(**{**SMALL, **beside, leaf: other}))
    assert after[shows] != before[shows]
    if leaf in HABITS:
        assert after["losses"] == before["losses"]


def test_compiled_blocks_learn_the_same(tmp_path: Path, plain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by torch's front end only: code generation takes a minute and is torch's business."""
    compiled = []

    def compile_block(block: Block) -> None:
        compiled.append(block)
        torch.nn.Module.compile(block, backend="eager")

    monkeypatch.setattr(Block, "compile", compile_block, raising=False)
    changed = tiny_run(tmp_path / "compiled", tiny_settings(compile=True))
    assert compiled == list(changed.model.model.layers)
    assert changed.losses == pytest.approx(plain.losses, rel=1e-6)
    resumed = tiny_run(tmp_path / "compiled")  # and its checkpoint is one of the plain model
    assert same_weights(resumed.model, changed.model)


def test_the_seed_matters_beyond_the_loader(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        settings, model, records = tiny_settings(seed=seed), tiny_model(), list[Record]()
        loader = PackedLoader(tiny_stream(), 16, 4, seed=0)
        directory = tmp_path / f"{seed}"
        train(model, loader, settings, directory, on_record=records.append, loss_function=dropping_loss)
        return [record["loss"] for record in records]

    assert losses(1) != losses(2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps = 0 must be above 0"),
        ({"steps": 10.5}, "steps = 10.5 must be of type int"),
        ({"steps": True}, "steps = True must be of type int"),
        ({"compile": 1}, "compute.compile = 1 must be of type bool"),
        ({"keep_last": -1}, "checkpoint.keep_last = -1 must be above 0"),
        ({"milestone_every": -1}, "checkpoint.milestone_every = -1 must be 0 or above"),
        ({"lr": float("nan")}, "optim.lr = nan must be of type finite float"),
        ({"lr": float("inf")}, "optim.lr = inf must be of type finite float"),
        ({"lr": "1e-3"}, "optim.lr = '1e-3' must be of type finite float"),
        ({"beta1": 1.0}, "optim.beta1 = 1.0 must be 0 or above, below 1"),
        ({"beta2": -0.1}, "optim.beta2 = -0.1 must be"),
        ({"weight_decay": -1}, "optim.weight_decay = -1.0 must be 0 or above"),
        ({"warmup_steps": -1}, "schedule.warmup_steps = -1 must be 0 or above"),
        ({"final_fraction": 1.1}, "schedule.final_fraction = 1.1 must be in 0 … 1"),
        ({"decay_fraction": 0.0}, "schedule.decay_fraction = 0.0 must be above 0, at most 1"),
        ({"spike_factor": 1.0}, "guard.spike_factor = 1.0 must be 0 or above 1"),
        ({"window": 0}, "guard.window = 0 must be above 0"),
        ({"z_loss": -1e-4}, "compute.z_loss = -0.0001 must be 0 or above"),
        ({"optim.name": "sgd"}, "optim.name = 'sgd' must be adamw or muon"),
        ({"schedule.name": "step"}, "schedule.name = 'step' must be one of cosine, wsd, linear"),
        ({"precision": "float16"}, "compute.precision = 'float16' must be bfloat16 or float32"),
        ({"strategy": "tp"}, "compute.strategy = 'tp' must be ddp or fsdp"),
        ({"seed": -1}, "seed = -1 must be 0 or above"),
        ({"seed": 2**63}, "seed = 9223372036854775808 must be"),
        (
            {"tokens_per_step": 60},
            "batch.tokens_per_step = 60 must be a multiple of batch.sequence_length = 16",
        ),
        ({"optim.name": "muon", "strategy": "fsdp"}, "optim.name = 'muon' needs whole matrices"),
        (
            {"steps": -2, "clip_norm": 0},
            "steps = -2 must be above 0; optim.clip_norm = 0.0 must be above 0",
        ),
    ],
    ids=str,
)
def test_refuses_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^train: {re.escape(words)}"):
        tiny_settings(**changes)


def test_a_section_must_be_one() -> None:
    with pytest.raises(ValueError, match="^train: batch = 7 must be a table$"):
        TrainSettings(steps=1, batch=7)  # type: ignore[arg-type]


def test_whole_numbers_are_floats_too() -> None:
    assert tiny_settings(clip_norm=1, weight_decay=0) == tiny_settings(clip_norm=1.0, weight_decay=0.0)


def test_the_defaults_are_the_papers() -> None:
    batch = BatchSettings(tokens_per_step=1024 * 2048, sequence_length=2048, micro_batch=32)
    settings = TrainSettings(steps=480_000, batch=batch)
    assert settings.batch.sequences_per_step == 1024
    assert settings.total_tokens == 480_000 * 2_097_152
    schedule, optim = settings.schedule, settings.optim
    assert (schedule.name, schedule.warmup_steps, schedule.final_fraction) == ("cosine", 1000, 0.1)
    assert (optim.name, optim.lr, optim.beta1, optim.beta2) == ("adamw", 2e-3, 0.9, 0.95)
    assert (optim.weight_decay, optim.clip_norm) == (0.1, 1.0)
