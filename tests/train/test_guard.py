"""The guard: what stops a run, what does not, and what is written down about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import newest_step, same_weights, stop_at, tiny_loader, tiny_model, tiny_run, tiny_settings
from torch import Tensor

from mobilellm.data.loader import PackedLoader
from mobilellm.model.transformer import MobileLLM
from mobilellm.train.guard import Guard, TrainingError
from mobilellm.train.loop import train
from mobilellm.train.loss import weighted_loss
from mobilellm.train.settings import GuardSettings

ADDRESS = {"windows": [12], "seed": 3}


def stops(guard: Guard, losses: list[float]) -> int:
    """The 1-based number of the loss that stops it, or 0."""
    for step, loss in enumerate(losses, 1):
        try:
            guard.check(step, loss, 1.0, ADDRESS, 0.1)
        except TrainingError:
            return step
    return 0


@pytest.mark.parametrize(
    ("loss", "norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)],
)
def test_what_is_no_number_always_stops(tmp_path: Path, loss: float, norm: float) -> None:
    guard = Guard(GuardSettings(), tmp_path)
    with pytest.raises(
        TrainingError, match="^step 1: loss .* and gradient norm .* are not both finite"
    ) as caught:
        guard.check(1, loss, norm, ADDRESS, 0.25)
    assert str(tmp_path / "bad-batch.json") in str(caught.value)
    assert "an optim.lr below 0.25" in str(caught.value)
    assert f"mobilellm data batch {tmp_path} shows its text" in str(caught.value)
    record = json.loads((tmp_path / "bad-batch.json").read_text(), parse_constant=pytest.fail)  # plain JSON
    assert record["batch"] == ADDRESS
    assert (record["step"], record["loss"], record["gradient_norm"]) == (1, str(loss), str(norm))
    assert record["reason"] in str(caught.value)


def test_it_goes_on_after_the_losses_it_is_given(tmp_path: Path) -> None:
    guard = Guard(GuardSettings(window=3), tmp_path)
    assert stops(guard, [1.0, 2.0]) == 0
    guard.restore([5.0, 6.0])
    assert guard.losses == (5.0, 6.0)
    guard.restore([5.0, 6.0, 7.0, 8.0])
    assert guard.losses == (6.0, 7.0, 8.0)


def test_a_spike(tmp_path: Path) -> None:
    settings = GuardSettings(spike_factor=2.0, window=20)
    usual = [4.0, 3.0, 5.0, 4.5, 3.5] * 4  # their median is 4
    assert stops(Guard(settings, tmp_path), [*usual, 8.0, *usual]) == 0  # not more than twice
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingError, match=r"step 21: loss 8.1000 is more than 2 times the usual 4.0000"):
        guard = Guard(settings, tmp_path)
        assert stops(guard, usual) == 0
        guard.check(21, 8.1, 1.0, ADDRESS, 0.1)
    assert json.loads((tmp_path / "bad-batch.json").read_text())["loss"] == "8.1"
    assert stops(Guard(GuardSettings(window=20), tmp_path), [*usual, 1e9]) == 0  # it was not asked to


def test_the_first_steps_are_no_spikes(tmp_path: Path) -> None:
    """Ten losses must have been seen; or as many as a smaller window holds."""
    settings = GuardSettings(spike_factor=2.0)
    assert stops(Guard(settings, tmp_path), [1.0] * 9 + [50.0]) == 0
    assert stops(Guard(settings, tmp_path), [1.0] * 10 + [50.0]) == 11
    assert stops(Guard(GuardSettings(spike_factor=2.0, window=3), tmp_path), [1.0] * 3 + [50.0]) == 4


def test_the_window_moves_along(tmp_path: Path) -> None:
    falling = [2.0 ** (-step / 20) for step in range(200)]
    assert stops(Guard(GuardSettings(spike_factor=1.5, window=10), tmp_path), [*falling, 0.01]) == 201
    assert stops(Guard(GuardSettings(spike_factor=1.5, window=200), tmp_path), [*falling, 0.01]) == 0


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    assert stops(Guard(GuardSettings(), tmp_path, is_first=False), [math.nan]) == 1
    assert not list(tmp_path.iterdir())


def test_the_batch_of_a_spike_can_be_looked_up(tmp_path: Path) -> None:
    """As the message says: the loader, put where the file says, gives the batch that did it."""
    batches: list[np.ndarray[Any, Any]] = []

    def jumping(model: MobileLLM, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        batches.append(tokens.numpy())
        return weighted_loss(model, tokens, targets, weights) * (9.0 if len(batches) == 14 else 1.0)

    settings, model = tiny_settings(steps=20, spike_factor=3.0, every=4, keep_last=9), tiny_model()
    with pytest.raises(TrainingError, match="^step 14: loss .* times the usual"):
        train(model, tiny_loader(settings), settings, tmp_path, loss_function=jumping)
    assert newest_step(tmp_path) == 12
    told = json.loads((tmp_path / "bad-batch.json").read_text())
    assert told["step"] == 14
    looking = tiny_loader(settings)
    looking.restore(told["batch"])
    assert np.array_equal(looking.next().tokens, batches[-1])
    # The weights were left alone by that batch: they are those after step 13.
    before = tiny_run(tmp_path / "before", settings, on_record=stop_at(13)).model
    assert same_weights(model, before)
    # The same command goes on from the last checkpoint, and through the step if it goes well this time.
    assert tiny_run(tmp_path, settings).done == 20


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_usual_is_known_after_a_resume(tmp_path: Path, asynchronous: bool) -> None:
    """A spike in the first step after it stops the run, as it would have without the interruption."""

    def jumping(model: MobileLLM, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weighted_loss(model, tokens, targets, weights) * 9.0

    settings = tiny_settings(steps=20, spike_factor=3.0, window=12, asynchronous=asynchronous)
    losses = tiny_run(tmp_path, settings, on_record=stop_at(13)).losses
    state = json.loads((tmp_path / "checkpoints" / "step-00000013" / "state.json").read_text())
    assert state["losses"] == losses[-12:]
    with pytest.raises(TrainingError, match="^step 14: loss .* times the usual"):
        tiny_run(tmp_path, settings, loss_function=jumping)


def test_a_checkpoint_without_losses_goes_on(tmp_path: Path) -> None:
    """One from before they were stored: the guard must first see some again."""
    settings = tiny_settings(steps=20, spike_factor=3.0)
    whole = tiny_run(tmp_path / "whole", settings)
    tiny_run(tmp_path / "old", settings, on_record=stop_at(13))
    file = tmp_path / "old" / "checkpoints" / "step-00000013" / "state.json"
    values = json.loads(file.read_text())
    del values["losses"], values["sha256"]  # nor was that of the state
    file.write_text(json.dumps(values))
    rest = tiny_run(tmp_path / "old", settings)
    assert rest.losses == whole.losses[13:]
    assert same_weights(rest.model, whole.model)


def test_a_loader_s_error_is_told(tmp_path: Path) -> None:
    """It happens in another thread, two batches ahead."""

    class Broken(PackedLoader):
        def next(self) -> Any:
            if self.state()["windows"][0] >= 12:
                raise OSError(5, "Input/output error", "shard-00003.bin")
            return super().next()

    settings = tiny_settings()
    loader = Broken(np.arange(600, dtype=np.uint16) % 384, 16, 4, settings.seed)
    with pytest.raises(OSError, match="Input/output error: 'shard-00003.bin'"):
        train(tiny_model(), loader, settings, tmp_path)
    assert newest_step(tmp_path) == 3  # what came before it was trained on
