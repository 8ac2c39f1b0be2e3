"""Trackers: what is handed on to other people's viewers, and from when on."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobilellm.train.recipe import LogChoice
from mobilellm.train.trackers import Trackers, check_tracker

STEP = {
    "step": 3, "loss": 2.5, "learning_rate": 0.1, "gradient_norm": 1.0, "tokens": 96, "seconds": 0.5,
    "peak_memory_bytes": 7,
}  # fmt: skip
CARD = {"tokens_per_step": 32, "flops_per_token": 10, "peak_flops": 1000.0, "world_size": 2}
RATES = {"train/tokens_per_second": 64.0, "train/mfu": 0.32}
"""Of STEP: 32 tokens in half a second, which take 640 of 2,000 FLOP/s."""


class Tracker:
    """Stands for trackio and wandb, as far as they are used."""

    __spec__ = ModuleSpec("tracker", None, origin="here")

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **arguments: Any) -> Any:
        self.calls.append(("init", arguments))
        print("* a tracker may say what it likes on standard output")
        return SimpleNamespace(log=lambda numbers, step: self.calls.append(("log", (step, numbers))))

    def finish(self) -> None:
        """Of the run that was begun last; one finished by itself trackio finishes again when Python ends."""
        self.calls.append(("finish", None))
        print("* and once more")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_a_tracker_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fake = Tracker()
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    log = LogChoice(tensorboard=False, tracker=name, project="mine")
    with Trackers(tmp_path / "run", log, CARD, 2) as trackers:
        assert fake.calls == []  # the folder may still turn out to be another's
        trackers.update(STEP)
        trackers.update({"step": 3, "eval": {"loss": 2.0}})
        trackers.update({"step": 3, "samples": [["It", " is"]]})
    (_, arguments), *rest = fake.calls
    run_id = arguments.pop("id", None)
    assert (run_id is not None) == (name == "wandb")  # by which a run that goes on is found again
    assert [("init", arguments), *rest] == [
        ("init", {"project": "mine", "name": "run", "config": CARD, "resume": "allow"}),
        ("log", (3, {f"train/{key}": value for key, value in STEP.items() if key != "step"} | RATES)),
        ("log", (3, {"eval/loss": 2.0})),
        ("finish", None),
    ]
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr()
    assert shown.out == ""  # is that of --json
    assert shown.err.count("*") == 2


def test_a_run_in_the_current_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    with Trackers(Path(), LogChoice(tensorboard=False, tracker="trackio"), {}, 0) as trackers:
        trackers.update(STEP)
    assert fake.calls[0][1]["name"] == tmp_path.name


def test_a_folder_of_that_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves one where it ran, and Python takes any folder for a package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if getattr(find_spec("wandb"), "origin", None) is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match=r"log.tracker = 'wandb' is not installed"):
        check_tracker(LogChoice(tracker="wandb"))
    with pytest.raises(ValueError, match=r"log.tracker = 'wandb' is not installed"):
        Trackers(tmp_path, LogChoice(tensorboard=False, tracker="wandb"), {}, 0)


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"log.tracker = 'wandb' is not installed; pip install wandb, or choose"
    ):
        Trackers(tmp_path, LogChoice(tracker="wandb"), {}, 0)


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    with Trackers(tmp_path, LogChoice(), {}, 0):
        pass
    assert not list(tmp_path.iterdir())
    with Trackers(tmp_path, LogChoice(), {}, 0) as trackers:
        trackers.update(STEP)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
