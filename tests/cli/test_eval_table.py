"""`mobilellm eval table`, as a user calls it; models are opened and scored by stand-ins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evaluation_records import all_eight, identity, perplexity
from mobilellm.cli.eval_model import ModelOptions
from mobilellm.cli.eval_table import Table, run_table
from mobilellm.cli.main import _main
from mobilellm.eval.interface import ModelIdentity
from mobilellm.eval.record import Record, read, save

from .refusals import refusal


class Model(NamedTuple):
    identity: ModelIdentity


class Opened(NamedTuple):
    model: Model


def identity_of(model: str) -> ModelIdentity:
    return replace(identity(model), fingerprint=(model.encode().hex() * 64)[:64])


class Machine:
    """Opens any model but those of `gated`; makes up its answers."""

    def __init__(self, gated: tuple[str, ...] = (), dtype: str = "bfloat16") -> None:
        self.gated, self.dtype, self.scored = gated, dtype, list[str]()

    def run(self, *models: str, **settings: Any) -> None:
        arguments = Table(models, **settings)

        @contextmanager
        def open_model(model: str) -> Iterator[Opened]:
            if model in self.gated:
                raise OSError(f"You are trying to access a gated repo.\n{model} needs a token.")
            yield Opened(Model(replace(identity_of(model), dtype=self.dtype)))

        def evaluate(opened: Opened) -> Record:
            self.scored.append(opened.model.identity.name)
            limit = arguments.limit
            record = all_eight(0.45, documents=limit or 200, model=opened.model.identity, limit=limit)
            if arguments.data_dir is None:
                return record
            return replace(record, protocol={**record.protocol, "data": {"piqa": {"file": "x"}}})

        run_table(arguments, open_model, evaluate)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def output_lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_published_tables_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["eval", "table", "--size", "125m"]) == 0
    found = output_lines(capsys.readouterr().out)
    assert found[0] == [
        "125M",
        "ARC-e",
        "ARC-c",
        "BoolQ",
        "PIQA",
        "SIQA",
        "HellaSwag",
        "OBQA",
        "WinoGrande",
        "average",
    ]
    assert [
        "MobileLLM-LS-125M",
        "45.8",
        "28.7",
        "60.4",
        "65.7",
        "42.9",
        "39.5",
        "41.1",
        "52.1",
        "47.0",
    ] in found
    assert not any(line[0] == "OPT-350M" for line in found)
    for arguments in (["eval", "table"], ["eval", "table", "--size", "all"]):
        assert _main(arguments) == 0
        assert (
            sum(line[-1].replace(".", "").isdigit() for line in output_lines(capsys.readouterr().out)) == 28
        )
    assert not list(Path().iterdir())


def test_it_needs_no_torch_and_no_matplotlib() -> None:
    script = (
        "import sys\nfrom mobilellm.cli.main import _main\nassert _main(['eval', 'table']) == 0\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, capture_output=True)


def test_models_stand_below_their_published_row(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    machine.run("OPT-125M", "125m=runs/mine", "some/other", metric="acc")
    shown = capsys.readouterr()
    found = output_lines(shown.out)
    names = [line[0] if line[0] != "ours:" else " ".join(line[:2]) for line in found]
    at = names.index("OPT-125M")
    assert names[at : at + 3] == ["OPT-125M", "ours: facebook/opt-125m", "difference"]
    at = names.index("MobileLLM-125M")
    assert names[at : at + 3] == ["MobileLLM-125M", "ours: runs/mine", "difference"]
    assert names.index("some/other") > names.index("MobileLLM-LS-125M")
    assert "OPT-350M" not in names  # by default the tables the models stand in
    published, ours, change = (found[names.index("OPT-125M") + i][-9:] for i in range(3))
    for before, now, difference in zip(published, ours, change, strict=True):
        assert float(difference) == pytest.approx(float(now) - float(before), abs=0.11)  # each is rounded
    assert "acc: lm-eval's" in shown.out
    kept = sorted(path.name for path in Path("evaluations").iterdir())
    assert kept == [
        "facebook--opt-125m.zero-shot.json",
        "runs--mine.zero-shot.json",
        "some--other.zero-shot.json",
    ]
    assert read(Path("evaluations", kept[0])).model.name == "facebook/opt-125m"


def test_what_is_recorded_is_not_scored_again(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    for _ in range(2):
        machine.run("OPT-125M", records=Path("kept"))
    assert machine.scored == ["facebook/opt-125m"]
    assert "from kept/facebook--opt-125m.zero-shot.json, made 2026-01-02" in capsys.readouterr().err
    machine.run("OPT-125M", records=Path("kept"), limit=7)
    assert machine.scored == ["facebook/opt-125m"] * 2
    assert "ours: facebook/opt-125m (first 7 of each)" in capsys.readouterr().out
    for settings in (
        {"data_dir": Path()},
        {"options": ModelOptions(dtype="float32")},
        {"options": ModelOptions(backend="transformers")},
    ):
        before = len(machine.scored)
        machine.run("OPT-125M", records=Path("kept"), **settings)
        if "data_dir" in settings:  # the record made now says so, and serves the next time
            machine.run("OPT-125M", records=Path("kept"), **settings)
        assert len(machine.scored) == before + 1


def test_a_record_of_widened_weights_serves_their_dtype() -> None:
    machine = Machine(dtype="bfloat16 (computed in float32)")
    for dtype in (None, "bfloat16", "bfloat16", "float32"):
        machine.run("OPT-125M", records=Path("kept"), options=ModelOptions(dtype=dtype))
    assert len(machine.scored) == 2


def test_one_that_fails_says_why_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(gated=("facebook/MobileLLM-125M",))
    with pytest.raises(ValueError, match="1 of 3 models could not be scored: facebook/MobileLLM-125M"):
        machine.run("OPT-125M", "MobileLLM-125M", "OPT-350M", json=Path("table.json"))
    shown = capsys.readouterr()
    assert (
        "mobilellm: facebook/MobileLLM-125M: You are trying to access a gated repo. facebook/MobileLLM-125M needs a token.\n"
        in shown.err
    )
    assert machine.scored == ["facebook/opt-125m", "facebook/opt-350m"]
    assert shown.out.count("ours:") == 2
    assert "gated repo" in json.loads(Path("table.json").read_text())["failed"]["facebook/MobileLLM-125M"]
    monkeypatch.setenv("MOBILELLM_DEBUG", "1")
    with pytest.raises(OSError, match="gated"):
        machine.run("MobileLLM-125M")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    Machine().run("OPT-125M", json=Path("table.json"), size="all", limit=20)
    found = json.loads(Path("table.json").read_text())
    assert (found["metric"], found["limit"], len(found["systems"]), found["failed"]) == ("paper", 20, 28, {})
    opt = found["systems"][0]
    ours = opt["measured"][0]
    assert ours["difference"]["piqa"] == pytest.approx(ours["percent"]["piqa"] - opt["published"]["piqa"])


def test_a_folder_of_tables_takes_in_perplexities_of_the_same_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine()
    save(perplexity([5000.0, 6000.0], identity_of("facebook/opt-125m")), "evaluations/ppl.json")
    save(perplexity([5000.0, 6000.0], identity("another")), "evaluations/ppl-another.json")
    machine.run("OPT-125M", out=Path("out"))
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "accuracy.png", "evaluation.json", "evaluation.md", "perplexity-1.png",
    ]  # fmt: skip
    page = Path("out/evaluation.md").read_text(encoding="utf-8")
    assert page.count("| wikitext2 |") == 1
    assert "| ↳ ours: facebook/opt-125m |" in page
    assert "Written: out/evaluation.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--data-dir", "nowhere"], "nowhere: no such folder"),
        (["opt-7b=x"], "'opt-7b' is not on the card"),
        (["--size", "7b"], "--size '7b' must be "),
    ],
)
def test_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refusal(capsys, "eval", "table", *arguments)
