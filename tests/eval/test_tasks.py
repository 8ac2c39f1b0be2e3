"""The eight tasks are lm-eval's, whether their rows come from its sources or from a local folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import task_rows

from mobilellm.eval.tasks import BY_NAME, EIGHT, LoadedTasks, load_tasks, quiet

NAMES = list(BY_NAME)


def rendered(loaded: LoadedTasks, name: str, limit: int | None = None) -> list[tuple[Any, ...]]:
    """(contexts and continuations, gold) of every document, as lm-eval makes and judges them."""
    task = loaded.tasks[name]
    with quiet():
        task.build_all_requests(limit=limit)
        documents = dict(task.doc_iterator(limit=limit))
    asked: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance.args)
    gold = task.doc_to_text if task.multiple_input else task.doc_to_target
    return [(asked[number], gold(document)) for number, document in documents.items()]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """datasets.load_dataset gives the hand-made rows; the list says what was asked of it."""
    places = {
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    }
    names = {"aps/super_glue": "boolq", "baber/piqa": "piqa", "lighteval/siqa": "social_iqa",
             "Rowan/hellaswag": "hellaswag", "allenai/openbookqa": "openbookqa",
             "allenai/winogrande": "winogrande"}  # fmt: skip
    asked: list[str | None] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> datasets.DatasetDict:
        asked.append(path)
        rows = datasets.Dataset.from_list(task_rows.HUB[places.get((path, str(name))) or names[path]])
        return datasets.DatasetDict({"train": rows, "validation": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_order_and_columns_are_those_of_the_published_tables() -> None:
    columns = ["ARC-e", "ARC-c", "BoolQ", "PIQA", "SIQA", "HellaSwag", "OBQA", "WinoGrande"]
    assert [task.column for task in EIGHT] == columns


def test_the_files_named_are_those_lm_eval_registers() -> None:
    """By the index of the folders they lie in; that of all folders takes half a minute."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for task in EIGHT:
        folder = root / task.registered.split("/")[0]
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)
        assert manager.task_index[task.name].yaml_path == root / task.registered


@pytest.mark.slow
def test_no_other_file_registers_their_names() -> None:
    import lm_eval.tasks

    index = lm_eval.tasks.TaskManager().task_index
    root = Path(lm_eval.tasks.__file__).parent
    assert [index[task.name].yaml_path for task in EIGHT] == [root / task.registered for task in EIGHT]


def test_local_rows_are_rendered_as_lm_evals_own(hub: list[str | None], tmp_path: Path) -> None:
    registered = load_tasks()
    assert len(hub) == 8
    own_fields = load_tasks((), task_rows.write(tmp_path / "hub", task_rows.HUB))
    other_fields = load_tasks((), task_rows.write(tmp_path / "local", {n: task_rows.local(n) for n in NAMES}))
    assert len(hub) == 8  # nothing more was asked
    assert list(registered.tasks) == list(own_fields.tasks) == list(other_fields.tasks) == NAMES
    for name in NAMES:
        expected = rendered(registered, name)
        assert len(expected) == 2
        assert rendered(own_fields, name) == expected
        assert rendered(other_fields, name) == expected
    golds = {name: [gold for _, gold in rendered(own_fields, name)] for name in NAMES}
    assert golds == {
        "arc_easy": [1, 0], "arc_challenge": [0, 2], "boolq": [1, 0], "piqa": [0, 1], "social_iqa": [2, 0],
        "hellaswag": [2, 0], "openbookqa": [0, 1], "winogrande": [0, 1],
    }  # fmt: skip
    assert registered.notes == own_fields.notes == []
    (note,) = other_fields.notes
    assert "617" in note


def test_every_task_keeps_lm_evals_metrics_and_version(hub: list[str | None], tmp_path: Path) -> None:
    registered = load_tasks()
    local = load_tasks((), task_rows.write(tmp_path, {name: task_rows.local(name) for name in NAMES}))
    for name in NAMES:
        assert local.tasks[name].aggregation() == registered.tasks[name].aggregation()
        assert local.tasks[name].VERSION == registered.tasks[name].VERSION
        assert local.tasks[name].config.target_delimiter == registered.tasks[name].config.target_delimiter
        assert local.tasks[name].config.num_fewshot == registered.tasks[name].config.num_fewshot is None


def test_validation_rows_serve_where_there_is_no_test_split(tmp_path: Path) -> None:
    task_rows.write(tmp_path, {"arc_easy": task_rows.HUB["arc_easy"]})
    (tmp_path / "arc_easy" / "test.jsonl").rename(tmp_path / "arc_easy" / "validation.jsonl")
    loaded = load_tasks(["arc_easy"], tmp_path)
    assert len(rendered(loaded, "arc_easy")) == 2
    assert loaded.notes == ["ARC-e: the validation split; lm-eval scores test"]


def test_real_data_renders_alike_in_both_shapes(shared: Path, tmp_path: Path) -> None:
    """The validation files of ARC and OBQA have the Hub's fields: turned into those of the test files."""
    for name in task_rows.TEST_SPLIT:
        lines = (shared / "zeroshot" / name / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:40]]
        task_rows.write(tmp_path / "hub", {name: rows})
        turned = [
            {
                "question": row.get("question") or row["question_stem"],
                "choices": row["choices"]["text"],
                "label": row["choices"]["label"].index(row["answerKey"].strip()),
            }
            for row in rows
        ]
        task_rows.write(tmp_path / "local", {name: turned})
        hub, local = load_tasks([name], tmp_path / "hub"), load_tasks([name], tmp_path / "local")
        assert rendered(hub, name) == rendered(local, name)


def test_all_of_the_real_data_is_read(shared: Path) -> None:
    loaded = load_tasks((), shared / "zeroshot")
    counts = {name: len(task.eval_docs) for name, task in loaded.tasks.items()}
    assert counts == {
        "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "piqa": 1838, "social_iqa": 1954,
        "hellaswag": 10042, "openbookqa": 500, "winogrande": 1267,
    }  # fmt: skip
    assert {file.path.parent.name: file.split for file in loaded.files.values()} == {
        "arc_easy": "test", "arc_challenge": "test", "boolq": "validation", "piqa": "validation",
        "social_i_qa": "validation", "hellaswag": "validation", "openbookqa": "test", "winogrande": "validation",
    }  # fmt: skip
    (context, continuation), *_ = rendered(loaded, "arc_easy", 1)[0][0]
    assert context.startswith("Question: Which statement best explains why photosynthesis")
    assert continuation == " Sunlight is the source of energy for nearly all ecosystems."


def test_nothing_is_asked_of_the_network_nor_kept(tmp_path: Path) -> None:
    task_rows.write(tmp_path / "data", {name: task_rows.local(name) for name in NAMES})
    script = f"""
import socket
asked = []
def refuse(*arguments, **options):
    asked.append(arguments)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from mobilellm.eval.tasks import load_tasks, quiet
loaded = load_tasks((), {str(tmp_path / "data")!r})
with quiet():
    for task in loaded.tasks.values():
        task.build_all_requests()
assert not asked, asked
print(sum(len(task.instances) for task in loaded.tasks.values()))
"""
    home = {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | home
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "44\n", done.stderr
    assert done.stderr == ""
    assert not [
        path for name in ("hf", "home", "tmp") for path in (tmp_path / name).rglob("*") if path.is_file()
    ]


def test_quiet_gives_everything_back(capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval import utils

    before = utils.env.from_string
    with quiet():
        for name in ("lm_eval", "datasets.load", "huggingface_hub.utils._http"):
            logging.getLogger(name).warning("noise")
        assert utils.env.from_string("{{x}}") is utils.env.from_string("{{x}}")
    assert utils.env.from_string == before
    assert logging.getLogger("lm_eval").level != logging.CRITICAL
    assert logging.getLogger("huggingface_hub").level != logging.CRITICAL
    assert not datasets.are_progress_bars_disabled()
    assert capsys.readouterr() == ("", "")


# Refusals


def test_an_unknown_task_is_told_the_eight(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="tasks: arc_eesy is not one of arc_easy, arc_challenge, boolq, piqa,"
    ):
        load_tasks(["arc_eesy", "piqa"], tmp_path)


@pytest.mark.slow
def test_other_tasks_of_lm_eval_and_unknown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="tasks: arc_eesy is not one of arc_easy, .* nor another task of lm-eval"
    ):
        load_tasks(["arc_eesy", "sciq"])
    rows = datasets.Dataset.from_list(
        [{"support": "It is blue.", "question": "Colour?", "distractor1": "red", "distractor2": "tan",
          "distractor3": "grey", "correct_answer": "blue"}]
    )  # fmt: skip
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda **options: datasets.DatasetDict({"train": rows, "validation": rows, "test": rows}),
    )
    assert list(load_tasks(["sciq"]).tasks) == ["sciq"]


def test_without_a_network_the_task_and_the_way_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr("mobilellm.hub_connection.why_unreachable", str)
    with pytest.raises(ValueError, match="piqa: its data cannot be had from lm-eval's source") as caught:
        load_tasks(["piqa"])
    assert "Couldn't reach 'baber/piqa' on the Hub" in str(caught.value)
    assert "--data-dir" in str(caught.value)
