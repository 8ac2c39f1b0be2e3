"""Which model is meant, and that what was scored once is not scored again, nor anything stale passed off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from evaluation_records import all_eight, identity, perplexity, zero_shot
from mobilellm.eval.interface import ModelIdentity
from mobilellm.eval.published import find
from mobilellm.eval.record import Record, save
from mobilellm.eval.rerun import Found, Wanted, measure, records, wanted


@dataclass(frozen=True)
class Model:
    identity: ModelIdentity


@dataclass(frozen=True)
class Opened:
    model: Any


class Machine:
    """Opens and scores; remembers what."""

    def __init__(self, fingerprint: str = "f" * 64, dtype: str = "bfloat16") -> None:
        self.fingerprint, self.dtype = fingerprint, dtype
        self.opened: list[str] = []
        self.scored: list[tuple[str, int | None]] = []

    def measure(self, model: str, folder: Path, limit: int | None = None, by_name: bool = True) -> Found:
        @contextmanager
        def open_model(name: str) -> Iterator[Opened]:
            self.opened.append(name)
            yield Opened(Model(replace(identity(name), fingerprint=self.fingerprint, dtype=self.dtype)))

        def evaluate(opened: Opened) -> Record:
            self.scored.append((opened.model.identity.name, limit))
            return all_eight(0.4, model=opened.model.identity, limit=limit)

        def fits(record: Record) -> bool:
            return record.protocol["limit"] == limit

        return measure(model, folder, fits, open_model, evaluate, by_name)


def test_what_is_wanted() -> None:
    opt = find("OPT-125M")
    for name in ("OPT-125M", "facebook/opt-125m", "opt-125m"):
        assert wanted(name).system is opt
        assert wanted(name).model == "facebook/opt-125m"
    assert wanted("ls-125m").model == "facebook/MobileLLM-125M-layer-share"
    assert wanted("gpt2") == Wanted("gpt2", None)
    assert wanted("125m=runs/mine").model == "runs/mine"
    assert wanted("125m=runs/mine").system is find("MobileLLM-125M")
    with pytest.raises(ValueError, match="'opt-7b' is not on the card; its systems are OPT-125M, "):
        wanted("opt-7b=runs/mine")
    with pytest.raises(ValueError, match="names no model"):
        wanted("OPT-125M=")


def test_a_directory_with_an_equals_sign_is_a_directory(tmp_path: Path) -> None:
    model = tmp_path / "lr=1"
    model.mkdir()
    assert wanted(str(model)).model == str(model)


def test_a_hub_model_is_scored_once(tmp_path: Path) -> None:
    machine = Machine()
    first = machine.measure("some/model", tmp_path)
    again = machine.measure("some/model", tmp_path)
    assert (first.reused, again.reused) == (False, True)
    assert again.record == first.record
    assert first.path == tmp_path / "some--model.zero-shot.json"
    assert machine.opened == ["some/model"]  # the second time it was not even opened


def test_what_does_not_fit_or_has_too_few_tasks_is_another_record(tmp_path: Path) -> None:
    machine = Machine()
    save(zero_shot({"piqa": [1, 0]}, identity("some/model")), tmp_path / "mine.json")
    machine.measure("some/model", tmp_path)
    limited = machine.measure("some/model", tmp_path, limit=5)
    assert limited.path.name == "some--model.zero-shot.first-5.json"
    assert machine.measure("some/model", tmp_path).reused
    assert machine.scored == [("some/model", None), ("some/model", 5)]


def test_a_revision_of_a_hub_model_is_known_by_what_it_is(tmp_path: Path) -> None:
    Machine("a" * 64).measure("some/model", tmp_path)
    later = Machine("b" * 64)
    assert not later.measure("some/model", tmp_path, by_name=False).reused
    assert later.measure("some/model", tmp_path, by_name=False).reused
    assert later.opened == ["some/model"] * 2


def test_a_directory_is_known_by_what_lies_in_it(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "records"
    model.mkdir()
    machine = Machine("a" * 64)
    assert not machine.measure(str(model), folder).reused
    assert machine.measure(str(model), folder).reused
    other = Machine("b" * 64)  # trained on since
    found = other.measure(str(model), folder)
    assert not found.reused
    assert len(list(folder.iterdir())) == 2  # the earlier record stays
    assert other.measure(str(model), folder).path == found.path
    assert not Machine("b" * 64, dtype="float32").measure(str(model), folder).reused  # other arithmetic


def test_records_of_a_folder_pass_over_what_is_none(tmp_path: Path) -> None:
    save(all_eight(0.4), tmp_path / "b.json")
    save(perplexity([1.0, 2.0]), tmp_path / "a.json")
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("[]")
    assert [path.name for path, _ in records(tmp_path, "zero-shot")] == ["b.json"]
    assert [path.name for path, _ in records(tmp_path, "perplexity")] == ["a.json"]
    assert list(records(tmp_path / "absent", "zero-shot")) == []


@pytest.mark.parametrize("name", ["../..", "/a/b c/", "ü/é", "..."])
def test_any_name_makes_a_file_inside_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "records"
    found = Machine("c" * 64).measure(name, folder)
    assert found.path.parent == folder
    assert found.path.is_file()
    assert not found.path.name.startswith(".")
