"""`mobilellm eval zero-shot`: the table, the files, what an interruption leaves, refusals of one line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import task_rows
from language_models import ToldModel

from absent_packages import without
from mobilellm.cli.main import _main
from mobilellm.eval import models
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request
from mobilellm.eval.record import read

NAMES = list(task_rows.HUB)


class Named(ToldModel):
    """Prefers short answers; raises KeyboardInterrupt after `patience` of them."""

    def __init__(self, name: str, patience: int = 10**6) -> None:
        super().__init__(lambda context, continuation: -float(len(continuation)))
        self.identity = ModelIdentity(name, "test", "float32", "cpu", name.ljust(64, "0"), 1, 4, {})
        self._patience = patience

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        for count, answer in enumerate(super().log_likelihoods(requests)):
            if count == self._patience:
                raise KeyboardInterrupt
            yield answer


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Named]:
    """Models by name, instead of those on a disk."""
    known: dict[str, Named] = {}

    def open_model(source: str, **options: Any) -> Named:
        return known.setdefault(source, Named(source))

    monkeypatch.setattr(models, "open_model", open_model)
    return known


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return task_rows.write(tmp_path / "data", {name: task_rows.local(name) for name in NAMES})


def run(*arguments: str | Path) -> int:
    return _main(["eval", "zero-shot", *map(str, arguments)])


def test_one_model_prints_its_table_and_writes_its_record(
    opened: dict[str, Named], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_file, likelihoods = tmp_path / "out" / "one.json", tmp_path / "one.jsonl.gz"
    files = ("--json", record_file, "--log-likelihoods", likelihoods)
    assert run("org/one", "--data-dir", data, "--no-cache", *files) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    header, _, acc, acc_norm, paper, *notes = captured.out.splitlines()
    columns = ["%", "ARC-e", "ARC-c", "BoolQ", "PIQA", "SIQA", "HellaSwag", "OBQA", "WinoGrande", "average"]
    assert header.split() == columns
    record = read(record_file)
    assert record.model.name == "org/one"
    for line, metric in ((acc, "acc"), (acc_norm, "acc_norm"), (paper, "paper")):
        name, shown, *cells = line.replace(" ± ", "±").split()
        assert (name, shown) == ("org/one", metric)
        for cell, task in zip(cells, [*NAMES, "average"], strict=True):
            result = record.results[task]
            if metric in result:
                error = result[f"{metric}_stderr"]
                assert cell == f"{100 * result[metric]:.1f}±{100 * error:.1f}"
            else:
                assert (cell, metric) == ("–", "acc_norm")
    text = "\n".join(notes)
    assert "reconstruction" in text
    assert "HellaSwag: the local file's text is preprocessed" in text
    with gzip.open(likelihoods, "rt") as lines:
        assert len(list(lines)) == 44


def test_columns_of_tasks_that_did_not_run_stay(
    opened: dict[str, Named], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("one", "--data-dir", data, "--no-cache", "--tasks", "winogrande,piqa", "--limit", "1") == 0
    header, _, acc, *rest = capsys.readouterr().out.splitlines()
    assert len(header.split()) == 10
    assert acc.split() == ["one", "acc", "–", "–", "–", "0.0", "–", "–", "–", "100.0", "–"]
    assert "only the first 1 documents of each task" in rest


def test_several_models_one_table_and_a_folder_of_records(
    opened: dict[str, Named], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, likelihoods = tmp_path / "records", tmp_path / "likelihoods"
    both = ("org/one", "./two", "--data-dir", data, "--tasks", "boolq", "--no-cache")
    assert run(*both, "--json", out, "--log-likelihoods", likelihoods) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:8]] == ["org/one"] * 3 + [
        "./two"
    ] * 3
    assert {path.name: read(path).model.name for path in out.iterdir()} == {
        "org_one.json": "org/one", "two.json": "./two",
    }  # fmt: skip
    assert sorted(path.name for path in likelihoods.iterdir()) == ["org_one.jsonl.gz", "two.jsonl.gz"]


def test_a_note_of_one_model_names_it(
    opened: dict[str, Named], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened["short"] = Named("short")
    opened["short"].context = 33
    assert run("short", "long", "--data-dir", data, "--tasks", "piqa", "--no-cache") == 0
    out = capsys.readouterr().out
    assert "\nshort: 3 requests were longer than the model's context" in out
    assert "\npaper: a reconstruction" in out


def test_an_interruption_says_what_is_kept_and_the_same_command_goes_on(
    opened: dict[str, Named], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "second",
        "--data-dir",
        data,
        "--cache",
        tmp_path / "cache",
        "--json",
        tmp_path / "record.json",
    )
    opened["second"] = Named("second", patience=20)
    assert run(*command) == 130
    captured = capsys.readouterr()
    assert "20 answers of this run are kept, and the same command goes on" in captured.err
    assert not (tmp_path / "record.json").exists()
    opened["second"] = Named("second")
    assert run(*command) == 0
    again = read(tmp_path / "record.json")
    assert again.cached == 20
    assert again.scored == len(opened["second"].calls[0]) > 20
    opened["second"] = Named("second")
    assert run(*command) == 0
    third = read(tmp_path / "record.json")
    assert (third.results, third.items) == (again.results, again.items)
    assert (third.scored, third.cached) == (0, again.scored + again.cached)
    assert opened["second"].calls == []


def test_what_was_finished_is_shown_whatever_becomes_of_the_rest(
    opened: dict[str, Named], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened["two"] = Named("two", patience=3)
    both = ("one", "two", "--data-dir", data, "--cache", tmp_path / "cache", "--json", tmp_path / "records")
    assert run(*both) == 130
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].startswith("one  acc")
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no model is named"),
        (["x", "--log-likelihoods", "-"], "--log-likelihoods - is packed and cannot be printed; name a file"),
        (["x", "--limit", "0"], "--limit 0 must be at least 1"),
        (["x", "--tasks", ","], "tasks = '' names none"),
        (["x", "--tasks", "arc_eesy", "--data-dir", "."], "arc_eesy is not one of arc_easy, arc_challenge,"),
        (["a/b", "a_b"], "two models would be written as 'a_b'"),
        (["x", "--data-dir", "nowhere"], "nowhere: is no folder"),
        (["x", "--data-dir", "."], ".: holds no data for arc_easy: it must have arc_easy/test.jsonl or"),
    ],
)
def test_refusals_are_one_line_and_come_before_the_model(
    arguments: list[str],
    complaint: str,
    opened: dict[str, Named],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mobilellm: error: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not opened


def test_several_records_do_not_go_into_a_file(
    opened: dict[str, Named], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run("one", "two", "--data-dir", data, "--json", tmp_path / "file") == 2
    assert "file: is a file; for several models name a folder" in capsys.readouterr().err


def test_a_cut_off_file_is_named_with_its_line(
    opened: dict[str, Named], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data / "winogrande" / "validation.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert run("one", "--data-dir", data) == 2
    assert f"{file}:2: is no JSON" in capsys.readouterr().err
    assert not opened


@pytest.mark.parametrize("absent", [("lm_eval",), ("lm_eval", "datasets", "transformers")])
def test_without_lm_eval_the_way_to_have_it_is_told(data: Path, absent: tuple[str, ...]) -> None:
    script = f"""{without(*absent)}
from mobilellm.cli.main import main
main(["eval", "zero-shot", "x", "--data-dir", {str(data)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "eval needs the package '" in done.stderr
    assert done.stderr.partition("package '")[2].partition("'")[0] in absent
    assert "[eval]" in done.stderr


def test_a_tiny_model_from_its_directory(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that lm-eval, datasets and transformers have to say reaches the terminal."""
    from tiny_baselines import make

    make("gpt-neox", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert run("model", "--data-dir", data, "--json", "out.json", "--cache", "cache") == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines()[2].startswith("model  acc ")
    assert [line for line in captured.err.splitlines() if "not by our own code" not in line] == []
    content = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert content["kind"] == "zero-shot"
    assert content["model"]["backend"] == "transformers"
    assert content["cached"] == 0 < content["scored"]
