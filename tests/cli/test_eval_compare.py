"""`mobilellm eval compare`, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation_records import all_eight, identity, perplexity
from mobilellm.cli.main import _main
from mobilellm.eval.compare import compare
from mobilellm.eval.record import read, save

from .refusals import refusal


@pytest.fixture(autouse=True)
def _records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(all_eight(0.4, model=identity("one")), "a.json")
    save(all_eight(0.6, seed=1, model=identity("two")), "b.json")
    save(all_eight(0.4, seed=2, model=identity("two")), "c.json")
    save(perplexity([5000.0, 6000.0, 5500.0], identity("one")), "pa.json")
    save(perplexity([4900.0, 5900.0, 5500.0], identity("two")), "pb.json")
    save(perplexity([4900.0, 5900.0, 5500.0], identity("two"), protocol="sliding"), "ps.json")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _main(["eval", "compare", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_two_records(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "a.json", "b.json", "--metric", "acc")
    assert text.startswith("two (second) against one (first), metric acc\n")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    row = compare(read("a.json"), read("b.json"), "acc").rows[-1]
    assert lines["average"][3:7] == [
        f"{100 * row.difference:+.1f}",
        f"{100 * row.low:+.1f}",
        "…",
        f"{100 * row.high:+.1f}",
    ]
    assert lines["average"][-1] == "0.001"  # the bootstrap's, "< 0.001"
    assert "10,000 resamples, seed 0" in text
    assert "3,000 resamples, seed 5" in output(capsys, "a.json", "b.json", "--samples", "3000", "--seed", "5")


def test_three_records_of_which_two_share_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "a.json", "b.json", "c.json")
    assert "two (b.json) (second) against one (first)" in text
    assert "two (c.json) (second) against one (first)" in text


def test_as_json_with_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "a.json", "b.json", "--json", "--out", "out"))
    assert [row["name"] for row in found["comparisons"][0]["rows"]][-1] == "average"
    assert found["files"] == ["out/evaluation.md", "out/difference.png", "out/evaluation.json"]
    assert all(Path(file).is_file() for file in found["files"])
    assert "## two against one, paper" in Path("out/evaluation.md").read_text(encoding="utf-8")


def test_perplexities(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "pa.json", "pb.json")
    assert "wikitext2 (reference)" in text
    assert "a token" in text
    assert "Neighbouring windows" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a.json"], "1 record is named; name at least two"),
        ([], "0 record is named"),
        (["a.json", "nowhere.json"], "nowhere.json: No such file"),
        (["a.json", "pa.json"], "not comparable: one (a.json) is a zero-shot record, one (pa.json)"),
        (["pa.json", "ps.json"], "wikitext2: not comparable: protocols reference and sliding"),
        (["a.json", "b.json", "--samples", "3"], "--samples 3 must be at least 100"),
        (["a.json", "b.json", "--metric", "f1"], "eval compare: --metric 'f1' must be "),
    ],
)
def test_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refusal(capsys, "eval", "compare", *arguments)


def test_a_torn_record_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.json").write_text(Path("b.json").read_text()[:500])
    assert _main(["eval", "compare", "a.json", "b.json"]) == 2
    assert "b.json: is no evaluation record" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    script = (
        "import sys\nfrom mobilellm.cli.main import _main\nassert _main(['eval', 'compare', 'a.json', 'b.json']) == 0\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, capture_output=True)
