"""A run folder read back: numbers computed by hand, runs cut off anywhere, folders that are no runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import FACTS, TOKENS_A_STEP, evaluation, records, step_record, write_run

from mobilellm.report.history import differences, read_history, summarise


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    summary = summarise(read_history(write_run(tmp_path / "x")))
    assert (summary.name, summary.steps, summary.planned_steps, summary.tokens) == (
        "a run",
        100,
        200,
        100_000,
    )
    assert (summary.parameters, summary.world_size) == (1_234_567, 2)
    assert summary.train_loss == pytest.approx(sum(8 / math.sqrt(step) for step in range(51, 101)) / 50)
    assert summary.held_out_last == {"step": 100, **evaluation(100, 2.5)["eval"]}
    assert summary.held_out_best == {"step": 50, **evaluation(50, 2.0)["eval"]}
    assert summary.tokens_per_second == pytest.approx(10_000)  # the slow first step does not count
    assert summary.mfu == pytest.approx(10_000 * 8e6 / (2 * 1e12))
    assert summary.mfu_6n == pytest.approx(10_000 * 6e6 / (2 * 1e12))
    assert summary.step_seconds == pytest.approx(5 + 99 * 0.1)
    assert summary.data_wait_share == pytest.approx(0.2 / (5 + 99 * 0.1))
    assert summary.peak_memory_bytes == 5_000_000_100


def test_a_run_from_before_there_were_facts(tmp_path: Path) -> None:
    """The quickstart's records: no run.json, no recipe, no memory, no time of the data."""
    old = [
        {key: value for key, value in record.items() if key not in ("data_seconds", "peak_memory_bytes")}
        for record in records()
    ]
    history = read_history(write_run(tmp_path / "old", old, facts=None, recipe=None))
    summary = summarise(history)
    assert summary.name == "old"
    assert summary.tokens_per_second == pytest.approx(10_000)
    assert (
        summary.planned_steps is summary.mfu is summary.data_wait_share is summary.peak_memory_bytes is None
    )
    assert history.recipe == {}


@pytest.mark.parametrize("peak", [None, 0, "fast"])
def test_without_a_peak_there_is_no_mfu(tmp_path: Path, peak: Any) -> None:
    summary = summarise(read_history(write_run(tmp_path, facts=FACTS | {"peak_flops": peak})))
    assert summary.mfu is summary.mfu_6n is None


def test_facts_of_another_type_are_not_believed(tmp_path: Path) -> None:
    odd = FACTS | {"parameters": "many", "world_size": None, "steps": 1.5, "peak_flops": 10**12, "name": ""}
    summary = summarise(read_history(write_run(tmp_path / "folder", facts=odd)))
    assert (summary.name, summary.parameters, summary.world_size) == ("folder", None, None)
    assert summary.planned_steps == 200  # of the recipe
    assert summary.mfu == pytest.approx(10_000 * 8e6 / 1e12)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_off_at_any_byte(tmp_path: Path, data: st.DataObject) -> None:
    """A crash while writing: what is whole counts, what is not is left out."""
    file = write_run(tmp_path / "cut") / "metrics.jsonl"
    whole = file.read_bytes()
    cut = data.draw(st.integers(whole.index(b"\n") + 1, len(whole)))
    file.write_bytes(whole[:cut])
    history = read_history(tmp_path / "cut")
    complete = [line for line in whole[:cut].split(b"\n") if line.endswith(b"}") and whole.find(line) >= 0]
    kept = [record for line in complete if (record := _parsed(line)) is not None]
    assert len(history.columns["step"]) == sum("loss" in record for record in kept)
    assert len(history.evaluations) == sum("eval" in record for record in kept)
    summarise(history)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def test_a_run_that_blew_up(tmp_path: Path) -> None:
    lines = [*records(), step_record(101, loss=math.nan, gradient_norm=math.inf), evaluation(101, math.nan)]
    history = read_history(write_run(tmp_path, lines))
    summary = summarise(history)
    assert summary.train_loss is not None
    assert math.isnan(summary.train_loss)
    assert summary.held_out_last is not None
    assert summary.held_out_last["step"] == 100


def test_where_an_evaluation_stands(tmp_path: Path) -> None:
    """After a lost start the first record stands for an average step; a step that is lost has no place."""
    history = read_history(write_run(tmp_path, [step_record(step) for step in range(11, 21)]))
    assert history.tokens_at(0) == 0
    assert history.tokens_at(15) == 15 * TOKENS_A_STEP
    assert history.tokens_at(5) is history.tokens_at(21) is None
    assert np.array_equal(history.tokens_a_step, np.full(10, TOKENS_A_STEP))


def test_only_an_evaluation_so_far(tmp_path: Path) -> None:
    summary = summarise(read_history(write_run(tmp_path, [evaluation(0, 9.0)])))
    assert (summary.steps, summary.tokens, summary.train_loss, summary.tokens_per_second) == (
        0,
        0,
        None,
        None,
    )
    assert summary.held_out_last is not None


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        read_history(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl there; it is no run folder"):
        read_history(tmp_path)
    write_run(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no record yet"):
        read_history(tmp_path / "empty")
    write_run(tmp_path / "hole", tail="garbage\n" + json.dumps(step_record(101)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 106 is damaged"):
        read_history(tmp_path / "hole")
    for name, text in (("run.json", "{"), ("run.json", "[]"), ("recipe.toml", "steps = ")):
        folder = write_run(tmp_path / "bad")
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}: not .* move it away"):
            read_history(folder)


def test_only_fields_that_differ(tmp_path: Path) -> None:
    recipes = {
        "a": 'steps = 200\n[optim]\nlr = 0.002\nname = "adamw"\n',
        "b": 'steps = 200\n[optim]\nlr = 0.004\nname = "adamw"\n[guard]\nwindow = 5\n',
        "c": None,
    }
    found = differences(
        [read_history(write_run(tmp_path / name, recipe=text)) for name, text in recipes.items()]
    )
    assert found == {"optim.lr": [0.002, 0.004, None], "guard.window": [None, 5, None]}
    alike = [read_history(write_run(tmp_path / name)) for name in ("d", "e")]
    assert differences(alike) == {}


def a_start(step: int, device: str, world_size: int, peak_flops: float | None) -> dict[str, Any]:
    return {"step": step, "device": device, "world_size": world_size, "peak_flops": peak_flops}


def test_a_run_that_went_on_elsewhere(tmp_path: Path) -> None:
    """Each step counts against the peak of the hardware it was done on, whichever came last."""
    first, then = a_start(0, "A", 4, 1e12), a_start(60, "B", 1, 1e12)
    facts = FACTS | {"device": "B", "world_size": 1, "starts": [first, then]}
    history = read_history(write_run(tmp_path / "both", facts=facts))
    assert history.start_of_step.tolist() == [0] * 60 + [1] * 40
    summary = summarise(history)
    assert summary.hardware == ["4 × A", "B"]
    assert (summary.device, summary.world_size) == ("B", 1)
    assert summary.mfu == pytest.approx(10_000 * 8e6 / (4 * 1e12))  # of the median step
    assert summary.mfu_6n == pytest.approx(10_000 * 6e6 / (4 * 1e12))
    for starts, hardware in (
        ([first, a_start(80, "C", 1, None), then], ["4 × A", "B"]),  # C's steps were taken back
        ([first, a_start(50, "A", 4, 1e12), then], ["4 × A", "B"]),
        ([first, then, a_start(90, "A", 4, 1e12)], ["4 × A", "B", "4 × A"]),
        ([first, then, a_start(100, "C", 1, None)], ["4 × A", "B"]),  # nothing done yet
    ):
        again = read_history(write_run(tmp_path / "both", facts=facts | {"starts": starts}))
        assert summarise(again).hardware == hardware


def test_the_peak_of_some_steps(tmp_path: Path) -> None:
    starts = [a_start(0, "CPU, 2 threads", 1, None), a_start(90, "B", 1, 1e12)]
    summary = summarise(read_history(write_run(tmp_path, facts=FACTS | {"starts": starts})))
    assert summary.mfu == pytest.approx(10_000 * 8e6 / 1e12)
    odd = [7, {"step": "x", "device": 3, "world_size": 0, "peak_flops": "much"}]
    summary = summarise(read_history(write_run(tmp_path, facts=FACTS | {"starts": odd})))
    assert (summary.mfu, summary.hardware) == (None, [])
