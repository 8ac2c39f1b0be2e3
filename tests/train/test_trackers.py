"""Trackers: what is handed on to other people's viewers, and from when on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobilellm.train.recipe import LogChoice
from mobilellm.train.trackers import Trackers

STEP = {"step": 3, "loss": 2.5, "learning_rate": 0.1, "gradient_norm": 1.0, "tokens": 96, "seconds": 0.5}


class Tracker:
    """Stands for trackio and wandb, as far as they are used."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **arguments: Any) -> Any:
        self.calls.append(("init", arguments))
        return SimpleNamespace(
            log=lambda numbers, step: self.calls.append(("log", (step, numbers))),
            finish=lambda: self.calls.append(("finish", None)),
        )


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_a_tracker_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake = Tracker()
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    log = LogChoice(tensorboard=False, tracker=name, project="mine")
    with Trackers(tmp_path / "run", log, {"steps": 9}, 2) as trackers:
        assert fake.calls == []  # the folder may still turn out to be another's
        trackers.update(STEP)
        trackers.update({"step": 3, "eval": {"loss": 2.0}})
        trackers.update({"step": 3, "samples": [["It", " is"]]})
    (_, arguments), *rest = fake.calls
    run_id = arguments.pop("id", None)
    assert (run_id is not None) == (name == "wandb")  # by which a run that goes on is found again
    assert [("init", arguments), *rest] == [
        ("init", {"project": "mine", "name": "run", "config": {"steps": 9}, "resume": "allow"}),
        ("log", (3, {f"train/{key}": value for key, value in STEP.items() if key != "step"})),
        ("log", (3, {"eval/loss": 2.0})),
        ("finish", None),
    ]
    assert not list(tmp_path.iterdir())


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
